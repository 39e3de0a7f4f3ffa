"""Weights on disk: safetensors in Hugging Face's layout, of which each rank reads and writes no more than it holds.

A model is built on the meta device, adapted and sharded there, and only then given memory: every rank reads its own
rows of every matrix from the files, one tensor at a time. Export goes the other way: one tensor at a time is gathered
to the rank that writes the file it belongs to. The whole model is never in one host's memory on its way.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel

from unlearn.distributed import barrier, fail_together, is_main, main_first, rank, world_size
from unlearn.errors import UserError
from unlearn.files import atomic_folder, hub_error, local_folder, temporary_name, write_json, writing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILE_BYTES = 2 << 30  # of one file of an export: what one rank has in host memory while it writes

READ_BYTES = 16 << 20  # what is read of a tensor at once

# In memory -> on disk, where Hugging Face's own checkpoints differ.
RENAMED = {"gpt_neox": {"lm_head.": "embed_out."}}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's folder.

    Attributes:
        path: what the user gave. folder: where the files are.
        files: the file of each tensor on disk.
    """

    path: str
    folder: Path
    files: dict[str, str]

    @classmethod
    def open(cls, path: str, *, revision: str | None = None) -> "Checkpoint":
        """Find the safetensors files of a local folder or hub name and which tensor is in which.

        Raises:
            UserError: there is none, one is damaged, or the index names a file that is missing.
        """
        folder = _folder(path, revision)
        index = folder / INDEX
        try:
            if index.is_file():
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            else:
                files = {key: file.name for file in sorted(folder.glob("*.safetensors")) for key in _keys(file)}
        except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
            raise hub_error(path, "model", error) from error
        if not files:
            raise UserError(
                f"expected *.safetensors in the model folder {path}; found none: convert its weights to safetensors"
            )
        missing = sorted(name for name in set(files.values()) if not (folder / name).is_file())
        if missing:
            raise UserError(
                f"expected the file {missing[0]} in {path}, as its index says; found {len(missing)} file(s) missing: "
                "fetch the model again"
            )
        return cls(path, folder, files)

    def paths(self) -> list[Path]:
        """The files that the tensors are in."""
        return sorted({self.folder / name for name in self.files.values()})

    def key(self, name: str, config: PretrainedConfig) -> str | None:
        """The name on disk of the tensor called `name` in memory, None if it is not there."""
        renamed = name
        for ours, theirs in RENAMED.get(config.model_type, {}).items():
            if name.startswith(ours):
                renamed = theirs + name.removeprefix(ours)
        bare = name.partition(".")[2]  # some checkpoints were saved from the base model alone
        return next((candidate for candidate in (renamed, name, bare) if candidate in self.files), None)

    def read_into(self, tensor: Tensor, key: str, first: int, shape: torch.Size) -> None:
        """Copy rows `first`, `first` + 1, ... of the tensor `key`, whose whole shape must be `shape`, into `tensor`.

        The file is opened anew for every few rows: what it maps into memory is then given back at once.
        """
        rows = tensor.shape[0] if tensor.ndim > 0 else 1
        step = max(1, READ_BYTES * rows // max(1, tensor.numel() * 4))
        try:
            for start in range(0, max(1, rows), step):
                with safe_open(self.folder / self.files[key], framework="pt") as tensors:
                    stored = tensors.get_slice(key)
                    self._check_shape(key, tuple(stored.get_shape()), tuple(shape))
                    if tensor.ndim == 0:
                        tensor.copy_(stored[:])
                    elif rows > 0:
                        part = tensor[start : start + step]
                        part.copy_(stored[first + start : first + start + part.shape[0]])
        except (OSError, SafetensorError) as error:
            raise hub_error(self.path, "model", error) from error

    def _check_shape(self, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise UserError(
                f"expected {key} of shape {expected} in {self.path}; found {found}: "
                "the files are not of this model, fetch them again"
            )


def _folder(path: str, revision: str | None) -> Path:
    source = local_folder(path, "model", "config.json")
    if Path(source).is_dir():
        return Path(source)
    try:
        with main_first():
            return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub_error(path, "model", error) from error


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Let every parameter that a module registers within the block be one on the meta device.

    The rest of a module (rotary frequencies above all, which no checkpoint stores) is built as usual.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


Initial = Callable[[str], Tensor | None]  # a parameter that no checkpoint has: its whole value, by name


def fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    part: nn.Module | None = None,
    initial: Initial = lambda name: None,
) -> None:
    """Give `model` memory on `device` and its weights from `checkpoint`; a sharded one reads each rank's rows alone.

    Args:
        part: fill only the parameters of this submodule; the others stay without memory.
        initial: values of parameters that the checkpoint lacks (adapters), asked for those alone.

    Raises:
        UserError: a tensor is missing, of another shape, damaged, or holds NaN or infinity.
    """
    target = model if part is None else part
    materialise(target, device)
    if part is None:
        model.tie_weights()
    wanted = {id(parameter) for parameter in target.parameters()}
    tied, missing = _tied_to(model), []
    for name, parameter in model.named_parameters():
        if id(parameter) not in wanted:
            continue
        local, first = local_rows(parameter)
        plain = name.replace(".base.", ".")  # without the layer that an adapter puts around a linear one
        key, value = checkpoint.key(plain, model.config), initial(name)
        if key is None and plain in tied:
            key = checkpoint.key(tied[plain], model.config)
        if value is not None:
            local.copy_(value[first : first + local.shape[0]])
        elif key is not None:
            checkpoint.read_into(local, key, first, parameter.shape)
        else:
            missing.append(plain)
            continue
        if not _finite(local):
            raise UserError(
                f"expected finite weights in {checkpoint.path}; found NaN or infinity in {plain}: use another "
                "checkpoint"
            )
    if missing:
        raise UserError(
            f"expected every tensor of the model in {checkpoint.path}; found {len(missing)} missing "
            f"({', '.join(missing[:3])}): the files are incomplete or not of this model, fetch them again"
        )


def _tied_to(model: PreTrainedModel) -> dict[str, str]:
    """{the unembedding's name: the embedding's} in a model that ties them: its files have one of the two."""
    if not model.config.tie_word_embeddings:
        return {}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return {names[id(model.get_output_embeddings())]: names[id(model.get_input_embeddings())]}


def _finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; `torch.isfinite` would need as much memory again."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def materialise(module: nn.Module, device: torch.device) -> None:
    """Memory on `device` for every parameter of `module`; buffers move there with their values."""
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    if sharded:
        module.to_empty(device=device)  # FSDP2 notices; for its buffers' values see below
    else:
        _replace_parameters(module, device)
    for part, name, buffer in buffers:
        part._buffers[name] = None if buffer is None else buffer.to(device)


def _replace_parameters(module: nn.Module, device: torch.device) -> None:
    """A new parameter for each one of `module`; what was tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]


@torch.no_grad()
def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, and which of its rows comes first: (rows [n, ..], first).

    FSDP2 shards rows: with S shards, rank s holds the s-th of the chunks of ceil(m / S) rows that `torch.chunk` makes.
    """
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    local, first = parameter.to_local(), 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0 and first == 0, "one mesh dimension shards rows, the others replicate"
            chunk = -(-parameter.shape[0] // parameter.device_mesh.size(dimension))
            first = min(parameter.shape[0], chunk * parameter.device_mesh.get_local_rank(dimension))
    return local, first


def export_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write every parameter in `dtype` into `folder`, as safetensors files of at most about 2 GiB and an index.

    Ranks write different files; a sharded parameter is gathered for its file alone, and leaves the other ranks at once.
    Every rank must call this, and `folder` must be there.
    """
    names = {name: parameter for name, parameter in model.named_parameters()}
    files = _split_files(names, dtype)
    for number, members in enumerate(files):
        mine = number % world_size() == rank()
        tensors: dict[str, Tensor] = {}
        for name in members:
            whole = full(names[name].detach())
            if mine:
                tensors[disk_key(name, model.config)] = whole.to(dtype).cpu().contiguous()
        with fail_together():
            if mine:
                file = folder / _file_name(number, len(files))
                with writing(file):
                    save_file(tensors, file, metadata={"format": "pt"})
    if rank() == 0 and len(files) > 1:
        where = {
            disk_key(name, model.config): _file_name(number, len(files))
            for number, members in enumerate(files)
            for name in members
        }
        size = sum(parameter.numel() for parameter in names.values()) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _split_files(names: dict[str, nn.Parameter], dtype: torch.dtype) -> list[list[str]]:
    """Tensors in the model's order, in files of at most `FILE_BYTES` (more only for a single larger tensor)."""
    files: list[list[str]] = []
    size = 0
    for name, parameter in names.items():
        count = parameter.numel() * dtype.itemsize
        if not files or size + count > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += count
    return files


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def disk_key(name: str, config: PretrainedConfig) -> str:
    """The name under which Hugging Face's checkpoints store the parameter `name`."""
    for ours, theirs in RENAMED.get(config.model_type, {}).items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@contextmanager
def shared_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """`files.atomic_folder` for all ranks together: they write into one temporary folder, which rank 0 renames.

    Raises:
        UserError: on every rank, if the place is not writable for one.
    """
    stack = ExitStack()
    with fail_together():
        if is_main():
            stack.enter_context(atomic_folder(folder, replace=replace))
    with stack:  # an error in the block ends rank 0's temporary folder
        yield temporary_name(folder)
        barrier()
        with fail_together():
            stack.close()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank that holds a shard must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
