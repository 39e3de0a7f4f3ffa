"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), written by hand.

An adapted linear layer computes W x + (alpha / r) B A dropout(x), with W frozen, A [r, in] Kaiming-uniform and B
[out, r] zero, so that the adapted model starts as the original. The original is always there: with the adapters
switched off the frozen weights compute exactly what they did.

Dropout masks are a hash of (row key, module, position, feature): one window meets the same mask on any rank, in any
micro-batch and under any padding.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn.distributed import fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import hub_error, write_json, writing
from unlearn.model import blocks, blocks_prefix
from unlearn.seeding import derive, dropped, generator
from unlearn.weights import full, local_rows, save_tensors

PEFT_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update.

    Attributes:
        base: the original layer (`nn.Linear`, or GPT-2's `Conv1D`, whose weight is stored as [in, out]).
        lora_A: float32 [r, in]. lora_B: float32 [out, r].
        rows: int64 [B], the layer's own keys of the current batch's rows; only read in training with dropout > 0.
        enabled: whether the update is added.
    """

    def __init__(self, base: nn.Module, name: str, *, rank: int, alpha: float, dropout: float, seed: int):
        super().__init__()
        outputs, inputs = shape_of(base)
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.base = base.requires_grad_(False)
        self.scale, self.dropout, self.salt = alpha / rank, dropout, derive(name)
        self.enabled, self.rows = True, torch.empty(0, dtype=torch.int64)
        self.name, self.seed = name, seed
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank, device=weight.device))
        if not weight.is_meta:
            self.lora_A.data.copy_(self.initial_A())
            self.lora_B.data.zero_()

    def initial_A(self) -> Tensor:
        """The whole A [r, in] before training, float32 on the CPU; it depends on the seed and the layer's name."""
        rank, inputs = self.lora_A.shape
        bound = 1.0 / math.sqrt(inputs)  # Kaiming-uniform with a = sqrt(5), PEFT's choice
        noise = torch.rand(rank, inputs, generator=generator(self.seed, "lora", self.name))
        return (2.0 * noise - 1.0) * bound

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, in] -> [B, S, out], in the base layer's dtype."""
        if not self.enabled:
            return self.base(x)
        update = self._update(x)  # before the base's product, which a recomputation of the block can then leave out
        output = self.base(x)
        return output + update.to(output.dtype)

    def _update(self, x: Tensor) -> Tensor:
        scale = self.scale
        if self.training and self.dropout > 0.0:
            assert len(self.rows) == x.shape[0], "set_dropout_rows must name every row of the batch before its forward"
            x, scale = dropped(x, self.rows.to(x.device), self.dropout), scale / (1.0 - self.dropout)
        return scale * nn.functional.linear(nn.functional.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """The update of the whole base weight, float32, in the layout in which the base stores it.

        With sharded adapters every rank must call this.
        """
        update = self.scale * (full(self.lora_B.detach()) @ full(self.lora_A.detach()))
        return update.T if isinstance(self.base, Conv1D) else update


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks, by full name."""
    prefix = blocks_prefix(model)
    named = blocks(model).named_modules()
    return {prefix + name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D))}


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted layer of `model`, by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    *,
    layers: Sequence[int] = (),
    seed: int = 0,
) -> list[nn.Parameter]:
    """Adapt linear layers inside the blocks, in place, and freeze everything else.

    Args:
        rank, alpha, dropout: r, alpha and the drop probability of the formula above.
        targets: last parts of layer names, e.g. `query_key_value`; by default every attention and MLP matrix.
        layers: blocks whose layers are adapted; by default all.
        seed: of A's initial values; the same at any number of ranks.

    Returns:
        the trainable parameters, A and B of each layer in turn.

    Raises:
        UserError: a target matches no layer.
    """
    layers_by_name = linears(model)
    for target in targets:
        if not any(name.split(".")[-1] == target for name in layers_by_name):
            known = ", ".join(sorted({name.split(".")[-1] for name in layers_by_name}))
            raise UserError(
                f"expected --lora-targets among {known}; found {target!r}: name linear layers of the blocks"
            )
    model.requires_grad_(False)
    for name, layer in layers_by_name.items():
        if not is_target(model, f"{name}.weight", targets, layers):
            continue
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(layer, name, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
        setattr(model.get_submodule(parent), child, adapted.train(layer.training))
    return [parameter for layer in adapters(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def is_target(model: PreTrainedModel, name: str, targets: Sequence[str], layers: Sequence[int]) -> bool:
    """Whether the matrix of this name, inside the blocks, is one to adapt: `targets` and `layers` as in `add_lora`."""
    return (not targets or name.split(".")[-2] in targets) and (not layers or _block_of(model, name) in layers)


def _block_of(model: PreTrainedModel, name: str) -> int:
    """The number of the block in which a layer of this name is."""
    return int(name.removeprefix(blocks_prefix(model)).partition(".")[0])


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Switch every adapter off for the length of the block: the model is then the original, to the bit."""
    layers = list(adapters(model).values())
    states = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.enabled = state


def initial_adapters(model: nn.Module) -> Callable[[str], Tensor | None]:
    """The whole initial value of an adapter's parameter by its name in `model`, None for any other parameter."""
    layers = adapters(model)

    def value(name: str) -> Tensor | None:
        layer, _, part = name.rpartition(".")
        if layer not in layers:
            return None
        return layers[layer].initial_A() if part == "lora_A" else torch.zeros(layers[layer].lora_B.shape)

    return value


def set_dropout_rows(model: nn.Module, keys: Tensor) -> None:
    """Name the rows of the next forward pass (int64 [B], in 0..2**31-1), from which dropout masks are derived.

    Each layer gets keys of its own as a tensor: a number in its forward would be compiled anew for every layer.
    """
    for layer in adapters(model).values():
        layer.rows = keys ^ layer.salt


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Add each update to its frozen weight, in float32 before rounding to the weight's dtype, and drop the adapters."""
    for name, layer in adapters(model).items():
        weight: Tensor = layer.base.weight  # type: ignore[assignment]
        rows, first = local_rows(weight)
        rows.copy_((rows.float() + layer.delta()[first : first + rows.shape[0]]).to(rows.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


def save_adapter(model: PreTrainedModel, folder: Path, base_name: str) -> None:
    """Write the adapters as PEFT does: `adapter_model.safetensors` and `adapter_config.json`.

    Every rank must call this; rank 0 writes.
    """
    layers = adapters(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = full(layer.lora_A.detach()).cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = full(layer.lora_B.detach()).cpu().contiguous()
    with fail_together():
        if is_main():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                save_tensors(tensors, folder / "adapter_model.safetensors")
            write_json(folder / "adapter_config.json", _peft_config(model, base_name))


def _peft_config(model: PreTrainedModel, base_name: str) -> dict[str, Any]:
    layers = adapters(model)
    first = next(iter(layers.values()))
    rank, adapted = first.lora_A.shape[0], sorted({_block_of(model, name) for name in layers})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "layers_to_transform": adapted if len(adapted) < len(blocks(model)) else None,
        "fan_in_fan_out": isinstance(first.base, Conv1D),
        "bias": "none",
        "inference_mode": True,
    }


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Adapt `model` with an adapter that `save_adapter` or PEFT wrote.

    Raises:
        UserError: a file is missing or damaged, or the tensors are not those of an adapter of this model.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise hub_error(str(folder), "adapter", error) from error
    where = config.get("layers_to_transform")  # PEFT takes a number for a list of one
    named = {"targets": config["target_modules"], "layers": [where] if isinstance(where, int) else where or ()}
    add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], **named)
    layers = adapters(model)
    expected = {f"{PEFT_PREFIX}{name}.lora_{part}.weight" for name in layers for part in "AB"}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise UserError(
            f"expected one pair of tensors for each of {len(layers)} layers in {folder}; found {len(odd)} "
            f"missing or surplus ({odd[0]}): use the adapter of this model"
        )
    for name, layer in layers.items():
        for part, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensor = tensors[f"{PEFT_PREFIX}{name}.lora_{part}.weight"]
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"expected lora_{part} of {name} of shape {tuple(parameter.shape)} in {folder}; found "
                    f"{tuple(tensor.shape)}: use the adapter of this model"
                )
            parameter.data.copy_(tensor)
