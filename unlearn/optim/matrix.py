"""One matrix of Muon in one step: what happens to it outside of communication."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unlearn.optim.layout import Layout
from unlearn.optim.polar import flops, polar_factor, wire_dtype

AdjustLr = Literal["match_rms_adamw", "original"]
Qkv = Literal["fused", "split", "per-head"]

BLOCK = 1 << 15  # elements: a few arrays of them stay in a core's cache
FUSED_QKV = "query_key_value.weight"  # GPT-NeoX: [heads * 3 * head size, hidden], per head the rows of q, of k, of v


@dataclass(frozen=True)
class Matrix:
    """A parameter [m, n], its gradient and momentum: this rank's rows of them, and the settings of its group.

    Attributes:
        weight, gradient, momentum: [rows, n] of this rank's shard, perhaps no rows.
        shape: (m, n).
        settings: the optimizer's parameter group.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    shape: tuple[int, int]
    layout: Layout
    settings: dict[str, Any]

    @property
    def cost(self) -> int:
        """Floating-point operations of orthogonalising it."""
        count, rows, columns = self._pieces
        settings = self.settings
        return count * flops(rows, columns, settings["method"], floor=settings["floor"], steps=settings["steps"])

    @property
    def device(self) -> torch.device:
        """Where its rows are."""
        return self.weight.device

    @property
    def wire(self) -> torch.dtype:
        """The dtype of what is orthogonalised, and of the update, wherever they are sent."""
        return wire_dtype(*self._pieces[1:], self.settings["floor"])

    @property
    def divided(self) -> bool:
        """Whether it is orthogonalised in pieces."""
        return self._pieces[0] > 1

    def elements(self, shard: int) -> int:
        """How many elements a shard holds."""
        return self.layout.rows(self.shape[0], shard) * self.shape[1]

    def advance(self, direction: Tensor | None) -> None:
        """Step the momentum, and write this rank's rows of what is to be orthogonalised into `direction`, [rows, n] or
        flat in the dtype `wire`, if this rank is to send or keep them."""
        beta = self.settings["momentum"]
        kept = self.momentum if direction is None else direction.view(self.momentum.shape)
        for gradient, momentum, out in _blocks(self.gradient, self.momentum, kept):
            momentum.lerp_(gradient, 1 - beta)
            if direction is None:
                continue
            if self.settings["nesterov"]:
                torch.lerp(gradient, momentum, beta, out=out)
            else:
                out.copy_(momentum)

    def compute(self, whole: list[Tensor]) -> Tensor:
        """Orthogonalise what is in a list, flat, whose memory serves the iteration: no reference to it is left."""
        pieces, settings = [self.split(whole.pop())], self.settings
        method, floor, steps = settings["method"], settings["floor"], settings["steps"]
        return self.join(polar_factor(pieces.pop(), method, floor=floor, steps=steps, overwrite=True))

    def update(self, rows: Tensor) -> None:
        """Decay this rank's rows of the weight, then move them against `rows`, [rows, n] or flat."""
        lr, decay = self.settings["lr"], self.settings["weight_decay"]
        alpha = -lr * lr_scale(self._pieces[1:], self.settings["adjust_lr"])
        for weight, step in _blocks(self.weight, rows.view(self.weight.shape)):
            weight.mul_(1 - lr * decay)
            _add(weight, step, alpha)

    @property
    def _pieces(self) -> tuple[int, int, int]:
        """(count, rows, columns) of what is orthogonalised by itself."""
        qkv, (m, n) = self.settings["qkv"], self.shape
        if qkv == "fused" or not self.name.endswith(FUSED_QKV):
            return 1, m, n
        count = 3 if qkv == "split" else 3 * self.settings["heads"]
        return count, m // count, n

    def split(self, whole: Tensor) -> Tensor:
        """Flat [m n] -> what is orthogonalised: [m, n], or [pieces, m / pieces, n]."""
        count, rows, n = self._pieces
        if count == 1:
            return whole.view(rows, n)
        if self.settings["qkv"] == "per-head":
            return whole.view(count, rows, n)
        heads = self.settings["heads"]
        return whole.view(heads, 3, rows // heads, n).transpose(0, 1).reshape(count, rows, n)

    def join(self, pieces: Tensor) -> Tensor:
        """The inverse of `split`, contiguous."""
        if self.divided and self.settings["qkv"] == "split":
            heads, (count, rows, n) = self.settings["heads"], pieces.shape
            pieces = pieces.reshape(count, heads, rows // heads, n).transpose(0, 1)
        return pieces.reshape(-1)


def _add(weight: Tensor, step: Tensor, alpha: float) -> None:
    """weight += alpha step, each element by the same arithmetic wherever it lies in its shard.

    On a CPU and below float32, torch rounds alpha first, then rounds once within its vectors of elements, but twice in
    those left over at the end, which are others on each number of ranks.
    """
    if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
        rounded = torch.tensor(alpha, dtype=weight.dtype).item()
        weight.copy_(weight.float().add_(step, alpha=rounded))
    else:
        weight.add_(step, alpha=alpha)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape, on a CPU in parts that stay in its cache from one operation to the next."""
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


def lr_scale(shape: tuple[int, ...], adjust_lr: AdjustLr) -> float:
    """What the learning rate of an [m, n] matrix is multiplied by."""
    rows, columns = shape
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
