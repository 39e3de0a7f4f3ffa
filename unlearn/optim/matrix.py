"""One matrix of Muon in one step: what happens to it outside of communication."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unlearn.optim.layout import Layout
from unlearn.optim.newton_schulz import flops, orthogonalize

AdjustLr = Literal["match_rms_adamw", "original"]
Qkv = Literal["fused", "split", "per-head"]

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
        return count * flops(rows, columns, self.settings["method"], self.settings["steps"])

    @property
    def divided(self) -> bool:
        """Whether it is orthogonalised in pieces."""
        return self._pieces[0] > 1

    def elements(self, shard: int) -> int:
        """How many elements a shard holds."""
        return self.layout.rows(self.shape[0], shard) * self.shape[1]

    def advance(self, direction: Tensor | None) -> None:
        """Step the momentum, and write this rank's rows of what is to be orthogonalised into `direction`, bfloat16
        [rows, n] or flat, if this rank is to send or keep them."""
        beta = self.settings["momentum"]
        self.momentum.lerp_(self.gradient, 1 - beta)
        if direction is None:
            return
        out = direction.view(self.gradient.shape)
        if self.settings["nesterov"]:
            torch.lerp(self.gradient, self.momentum, beta, out=out)
        else:
            out.copy_(self.momentum)

    def orthogonalize(self, whole: Tensor) -> Tensor:
        """bfloat16 [m, n] -> bfloat16 [m, n], contiguous; in pieces where Q, K and V are taken apart."""
        method, steps = self.settings["method"], self.settings["steps"]
        pieces = self._split(whole)
        del whole
        if pieces.ndim == 2:
            return orthogonalize(pieces, method, steps).contiguous()
        return self._join(orthogonalize(pieces, method, steps))

    def update(self, rows: Tensor) -> None:
        """Decay this rank's rows of the weight, then move them against `rows`, bfloat16 [rows, n] or flat."""
        lr, decay = self.settings["lr"], self.settings["weight_decay"]
        alpha = -lr * lr_scale(self._pieces[1:], self.settings["adjust_lr"])
        rows = rows.view(self.weight.shape)
        self.weight.mul_(1 - lr * decay)
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            # The kernel for these dtypes rounds once in its vectors and twice in the elements left over at the end,
            # which are others on each number of ranks.
            self.weight.copy_(self.weight.float().add_(rows, alpha=alpha))
        else:
            self.weight.add_(rows, alpha=alpha)

    @property
    def _pieces(self) -> tuple[int, int, int]:
        """(count, rows, columns) of what is orthogonalised by itself."""
        qkv, (m, n) = self.settings["qkv"], self.shape
        if qkv == "fused" or not self.name.endswith(FUSED_QKV):
            return 1, m, n
        count = 3 if qkv == "split" else 3 * self.settings["heads"]
        return count, m // count, n

    def _split(self, whole: Tensor) -> Tensor:
        """[m, n] -> [count, m / count, n], or unchanged."""
        count, rows, n = self._pieces
        if count == 1:
            return whole
        if self.settings["qkv"] == "per-head":
            return whole.view(count, rows, n)
        heads = self.settings["heads"]
        return whole.view(heads, 3, rows // heads, n).transpose(0, 1).reshape(count, rows, n)

    def _join(self, pieces: Tensor) -> Tensor:
        """The inverse of `_split`, contiguous."""
        if self.settings["qkv"] == "split":
            heads, (count, rows, n) = self.settings["heads"], pieces.shape
            pieces = pieces.reshape(count, heads, rows // heads, n).transpose(0, 1)
        return pieces.reshape(self.shape)


def lr_scale(shape: tuple[int, ...], adjust_lr: AdjustLr) -> float:
    """What the learning rate of an [m, n] matrix is multiplied by."""
    rows, columns = shape
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
