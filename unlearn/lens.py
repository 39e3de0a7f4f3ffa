"""The tuned lens (Belrose et al. 2023, https://arxiv.org/abs/2303.08112): read, write, apply.

A lens has one affine translator a layer. What it reads off the residual stream h that enters block l is

    z[l] = U . norm_f(h + A[l] h + b[l])

with norm_f the model's final norm and U its unembedding, both copies of the model the lens was made for. l = L, the
stream that leaves the last block, has no translator: z[L] are the model's own logits.

On disk: `params.safetensors` (or `model.safetensors`, or the `tuned-lens` package's `params.pt`) with `{l}.weight`
[D, D] and `{l}.bias` [D], beside `config.json`.
"""

import copy
import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.files import check_file, hub_error, local_folder, writing
from unlearn.losses import logits_of
from unlearn.model import final_norm, softcap, unembedding
from unlearn.weights import save_tensors

WEIGHT_FILES = ("params.safetensors", "model.safetensors", "params.pt")
PREFIX = "layer_translators."
BF16_HASH = "unembed_hash_bf16"  # ours: the hash after rounding, by which a model loaded in bfloat16 is known


class TunedLens(nn.Module):
    """A frozen lens over frozen copies of a model's final norm and unembedding.

    Attributes:
        translators: {"l": Linear with A[l] [D, D] and b[l] [D]}, for the layers that were loaded.
        norm, unembedding: the model's final norm and U [V, D].
    """

    def __init__(self, model: PreTrainedModel, translators: dict[int, tuple[Tensor, Tensor]]):
        super().__init__()
        matrix = unembedding(model).detach()
        self.translators = nn.ModuleDict()
        for layer, (weight, bias) in translators.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight = nn.Parameter(weight.to(matrix, copy=True))
            linear.bias = nn.Parameter(bias.to(matrix, copy=True))
            self.translators[str(layer)] = linear
        self.norm = copy.deepcopy(final_norm(model))
        self.unembedding = nn.Parameter(matrix.clone())
        self.requires_grad_(False)
        self.softcap = softcap(model)
        self.depth = int(model.config.num_hidden_layers)
        self.base_name = str(model.config.name_or_path)

    @classmethod
    def load(cls, path: str, model: PreTrainedModel, layers: Iterable[int] | None = None) -> "TunedLens":
        """Read the translators of `layers` (all of 0..L-1 by default), one tensor at a time.

        Args:
            path: a folder or hub name.
            model: the original model; its norm and unembedding are copied, in its dtype and onto its device.

        Raises:
            UserError: files missing or damaged, or a lens of another model, width or depth.
        """
        depth = int(model.config.num_hidden_layers)
        wanted = sorted(set(range(depth) if layers is None else layers) - {depth})
        if not wanted:
            return cls(model, {})
        folder = _folder(path)
        _check_config(_read_config(folder), model, path)
        width = int(model.config.hidden_size)
        return cls(model, {layer: pair for layer, pair in _read_translators(folder, wanted, width)})

    @classmethod
    def identity(cls, model: PreTrainedModel, layers: Iterable[int] | None = None) -> "TunedLens":
        """The logit lens at `layers` (all by default): every translator zero, so that z[l] = U norm_f(h[l])."""
        width = int(model.config.hidden_size)
        layers = range(int(model.config.num_hidden_layers)) if layers is None else layers
        return cls(model, {layer: (torch.zeros(width, width), torch.zeros(width)) for layer in layers})

    @property
    def layers(self) -> list[int]:
        """Those that it has a translator for."""
        return [int(layer) for layer in self.translators]

    def for_training(self) -> "TunedLens":
        """With translators in float32, which are trained, and the norm in float32; the unembedding stays as it is."""
        self.translators.float().requires_grad_(True)
        self.norm.float()
        return self

    def hidden(self, h: Tensor, layer: int) -> Tensor:
        """The normalised hidden state [.., D] that the unembedding reads, of a residual stream [.., D].

        Computed in the translators' dtype, and given in the unembedding's.
        """
        h = h.to(next(self.translators.parameters(), self.unembedding).dtype)
        if layer < self.depth:
            h = h + self.translators[str(layer)](h)
        return self.norm(h).to(self.unembedding.dtype)

    def logits(self, h: Tensor, layer: int) -> Tensor:
        """Float32 logits [.., V] of a residual stream [.., D]; for a few tokens, never for a whole batch."""
        return logits_of(self.hidden(h, layer), self.unembedding, self.softcap)

    def save(self, path: str | Path) -> None:
        """Write `params.safetensors`, the `tuned-lens` package's `params.pt` and `config.json` into a folder."""
        folder = Path(path)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.translators.named_parameters():
            tensors[name] = parameter.detach().cpu().contiguous()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, folder / "params.safetensors")
            _save_pickle(tensors, folder / "params.pt")
            (folder / "config.json").write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        return {
            "base_model_name_or_path": self.base_name,
            "d_model": self.unembedding.shape[1],
            "num_hidden_layers": self.depth,
            "bias": True,
            "base_model_revision": None,
            "unembed_hash": unembedding_hash(self.unembedding),
            BF16_HASH: unembedding_hash(self.unembedding.bfloat16()),
            "lens_type": "linear_tuned_lens",
        }


def fitted_layers(path: str) -> list[int]:
    """The layers l whose translators a lens has, rising.

    Raises:
        UserError: the folder or its files are missing or damaged.
    """
    with _open_tensors(_folder(path)) as tensors:
        names = (name.removeprefix(PREFIX).partition(".") for name in tensors.keys())
        return sorted({int(layer) for layer, _, what in names if what == "weight" and layer.isdigit()})


def _save_pickle(tensors: dict[str, Tensor], file: Path) -> None:
    """`torch.save`, whose writer hides what the operating system answered."""
    try:
        torch.save(tensors, file)
    except RuntimeError as error:
        raise UserError(f"expected to write {file}; found {str(error).splitlines()[0]!r}: free some space") from error


def unembedding_hash(matrix: Tensor) -> str:
    """The `tuned-lens` package's hash of an unembedding: of numpy's print-out of its corners, to one decimal."""
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False, floatmode="maxprec", sign="-"):
        text = np.array_str(matrix.detach().cpu().float().numpy(), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(path: str) -> Path:
    """The local folder of a lens; fetched (or found in the hub's cache) where `path` is a hub name."""
    source = local_folder(path, "lens", "config.json")
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", *WEIGHT_FILES]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub_error(path, "lens", error) from error


def _read_config(folder: Path) -> dict[str, Any]:
    check_file(folder / "config.json", "lens config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise hub_error(str(folder), "lens config.json", error) from error
    if not isinstance(config, dict):
        raise UserError(f"expected an object in {folder}/config.json; found {type(config).__name__}: use another lens")
    return config


def _check_config(config: dict[str, Any], model: PreTrainedModel, path: str) -> None:
    """Raise unless the lens says that it was made for this model."""
    expected = {"d_model": model.config.hidden_size, "num_hidden_layers": model.config.num_hidden_layers}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(
                f"expected a lens with {key} {value}, as the model has; found {config[key]} in {path}: "
                "use the lens of this model, or fit one with `python -m unlearn fit-lens`"
            )
    matrix = unembedding(model)
    hashes = {key: config[key] for key in ("unembed_hash", BF16_HASH) if config.get(key) is not None}
    for key, value in hashes.items():
        if not isinstance(value, str):
            raise UserError(f"expected {key} in {path}/config.json to be text; found {value!r}: use another lens")
    stored = set(hashes.values())
    if stored & {unembedding_hash(matrix), unembedding_hash(matrix.bfloat16())}:
        return
    name = str(config.get("base_model_name_or_path", ""))
    if stored and (matrix.dtype == torch.float32 or config.get(BF16_HASH) is not None):
        raise UserError(
            f"expected a lens fitted to the unembedding of {model.config.name_or_path}; found one of {name} with "
            f"another unembed_hash in {path}: use the lens of this model"
        )
    # Without a hash, or with that of more digits than are in memory, the name must do.
    if (stored or name) and Path(name).name != Path(str(model.config.name_or_path)).name:
        raise UserError(
            f"expected a lens of {model.config.name_or_path}; found one of {name} in {path}: use the lens of this model"
        )


def _read_translators(folder: Path, layers: Iterable[int], width: int) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]:
    """Yield (l, (A[l], b[l])), checked for shape, dtype and finiteness."""
    with _open_tensors(folder) as tensors:
        for layer in layers:
            weight = _tensor(tensors, f"{layer}.weight", (width, width), folder)
            bias = _tensor(tensors, f"{layer}.bias", (width,), folder)
            yield layer, (weight, bias)


def _tensor(tensors: Any, key: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    names = set(tensors.keys())
    name = key if key in names else PREFIX + key
    if name not in names:
        raise UserError(
            f"expected the tensor {key} in the lens {folder}; found {len(names)} tensors without it: "
            "choose other --layers or another lens"
        )
    tensor = tensors.get_tensor(name)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
        found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"expected {key} of shape {shape} in the lens {folder}; found {found}: use another lens")
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"expected finite numbers in the lens {folder}; found NaN or infinity in {key}: use another lens"
        )
    return tensor


class _Pickled:
    """A `params.pt` with the reading interface of `safe_open`."""

    def __init__(self, file: Path):
        try:
            self._tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"expected plain tensors in {file}; found a pickle that is damaged or holds something else, which is "
                "never executed: convert it to safetensors where it was made"
            ) from error
        if not isinstance(self._tensors, dict):
            raise UserError(
                f"expected a dictionary of tensors in {file}; found {type(self._tensors).__name__}: use another lens"
            )

    def __enter__(self) -> "_Pickled":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _open_tensors(folder: Path) -> Any:
    """Open the first of the known weight files, safetensors before a pickle."""
    for name in WEIGHT_FILES:
        file = folder / name
        if not file.is_file():
            continue
        check_file(file, "lens")
        if file.suffix == ".pt":
            return _Pickled(file)
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(
                f"expected a whole safetensors file at {file}; found a damaged one ({error}): fetch it again"
            ) from error
    raise UserError(f"expected one of {', '.join(WEIGHT_FILES)} in the lens folder {folder}; found none: check --lens")
