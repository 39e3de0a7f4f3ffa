"""Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, then orthogonalisation."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unlearn.distributed import world_size
from unlearn.errors import UserError
from unlearn.optim.layout import Layout, layout_of, mesh_dimensions
from unlearn.optim.matrix import FUSED_QKV, AdjustLr, Matrix, Qkv
from unlearn.optim.newton_schulz import Method
from unlearn.optim.polar import FLOOR, HIGHEST_FLOOR, polar_factor
from unlearn.optim.rounds import pipeline, plan, run_round

SMALL_SIDE, BATCH = 128, 64
BLOCK_ASPECT = 4  # no weight of a transformer block is longer for its width than this; adapters are
ROUNDING = 2.0**-20  # eight float32 roundings: a root mean square this far below the greatest gradient's is noise


class Muon(torch.optim.Optimizer):
    """Muon for matrices that are sharded by FSDP2 (one- or two-dimensional meshes), whole on every rank, or mixed.

    The weights after a step are the same bits on any number of ranks: a matrix is orthogonalised whole, by one rank,
    from the same numbers in the same products; all else is elementwise. With `quintic` they are also those of
    `torch.optim.Muon` in one process.

    Nor is it a magnifier of rounding, as orthogonalisation by itself is: singular values below `floor` of the greatest
    pass in proportion (`polar.py`), and a gradient that is nothing but rounding beside the others counts as zero.

    Communication of one step, with W = R S ranks, of which S hold a matrix together, R times over; P parameters:

    1. One all-reduce of 16 bytes a matrix: which gradients are missing, and their sums of squares. If one is not
       finite on some rank, every rank raises, and nothing has been changed.
    2. Momentum is stepped where it lies, in the parameter's own placement: no communication.
    3. Every matrix has one owner, by longest processing time over the operations of its Newton-Schulz iteration. In
       rounds of at most one matrix for each owner: the S ranks of a replica send their rows of the direction to the
       owners among them, through one uneven all-to-all in bfloat16 (float32 for a short side up to 64, whose factor
       is exact); the owner orthogonalises; another all-to-all brings the rows of the updates back. Each way a rank
       sends 2 P / W (S - 1) / S bytes on average. With R > 1
       each replica then passes its updates' shards on to the other R - 1, by broadcast, a shard at a time.
    4. While one round is orthogonalised the next is on its way to its owners and the one before on its way back.
       Peak memory above weights, gradients and momenta: about five times the largest matrix in bfloat16 if R = 1, and
       R times more otherwise, for what the other replicas send.

    Matrices that are whole on every rank (S = 1, R = W) need no way to their owner, only the broadcast back. Small
    ones (LoRA's: short side up to 128, the other more than four times as long) are not sent at all: every rank
    orthogonalises all of them, in batches of up to 64 of one shape. A short side s means about 10 s operations for each
    byte sent, which a GPU does before the byte has arrived, and one batched product costs less than its share of 64
    small ones. `quintic` does them one by one: a batch might change its bits.

    Gradients of matrices that are whole on every rank must be equal there, i.e. already summed over ranks. A gradient
    that is missing on some ranks counts as zero there; one that is missing on all leaves its parameter alone.

    Args:
        named_parameters: (name, matrix [m, n]) pairs, or groups of them: [{"params": pairs, "lr": ..}, ..].
        lr: learning rate, before the adjustment by shape.
        momentum: of the exponential moving average of gradients, which is kept in the parameter's dtype.
        nesterov: look one step of momentum ahead.
        weight_decay: decoupled; each step multiplies a weight by 1 - lr * weight_decay, with the unadjusted lr.
        adjust_lr: `match_rms_adamw` multiplies lr by 0.2 sqrt(max(m, n)), so that an update's root mean square is that
            of AdamW (Liu et al. 2025, https://arxiv.org/abs/2502.16982); `original` by sqrt(max(1, m / n)).
        method: of the Newton-Schulz iteration, see `newton_schulz.py`.
        floor: share of the greatest singular value below which others pass in proportion, up to 0.1; by default 0.01,
            and 0 with `quintic`, which has none. With 0, rounding too is lifted to full size, as by torch's.
        steps: iterations; by default as many as the floor needs, and 5 without one.
        qkv: how GPT-NeoX's `query_key_value.weight` is orthogonalised: `fused`, as one matrix; `split`, Q, K and V
            each; `per-head`, each head's q, k and v each. `adjust_lr` then goes by the shape of a piece.
        heads: attention heads, for `split` and `per-head`.

    Raises:
        ValueError: a parameter is not a named matrix, or lies in a way that is not supported; or there is no fused
            matrix to split, or it does not divide into `heads`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        adjust_lr: AdjustLr = "match_rms_adamw",
        method: Method = "gram",
        floor: float | None = None,
        steps: int | None = None,
        qkv: Qkv = "fused",
        heads: int | None = None,
    ):
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        defaults |= {"adjust_lr": adjust_lr, "method": method, "steps": steps, "qkv": qkv, "heads": heads}
        defaults["floor"] = floor
        super().__init__(named_parameters, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add matrices, and their momenta, zero, so that a checkpoint can be loaded before the first step."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["floor"] is None:
            group["floor"] = default_floor(group["method"])
        _check_group(group)
        names = [name for group in self.param_groups for name in group["param_names"]]
        if len(set(names)) < len(names):
            raise ValueError("expected a name of its own for each matrix; found one twice")
        for parameter in group["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient on some rank; a closure, if given, is evaluated first.

        Raises:
            UserError: a gradient is not finite on some rank; every rank raises, before any weight has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        small, large = _sizes(self._matrices())
        for batch in _batches(small):
            _update_batch(batch)
        pipeline(run_round(layout, owned) for layout, owned in plan(large, world_size()))
        return loss

    def _matrices(self) -> list[Matrix]:
        """Every parameter with a gradient on some rank, once all of them are known to be finite."""
        named = [
            (name, parameter, group)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        if not named:
            return []
        layouts = [layout_of(name, parameter) for name, parameter, _ in named]
        norms = _root_mean_squares(named, layouts)
        greatest = max(norms.values(), default=0.0)
        return [
            Matrix(
                name,
                _local(parameter),
                _gradient(parameter, is_noise=group["floor"] > 0.0 and norms[name] <= ROUNDING * greatest),
                _local(self.state[parameter]["momentum_buffer"]),
                (parameter.shape[0], parameter.shape[1]),
                layout,
                group,
            )
            for (name, parameter, group), layout in zip(named, layouts, strict=True)
            if name in norms
        ]


def default_floor(method: Method) -> float:
    """The floor of a method, where none is given."""
    return 0.0 if method == "quintic" else FLOOR


def _check_group(group: dict[str, Any]) -> None:
    """Raise unless every parameter is a named matrix, in a known layout, that can be taken apart as the group says."""
    if "param_names" not in group:
        raise ValueError("expected named parameters for Muon; found parameters alone: give (name, parameter) pairs")
    if not 0.0 <= group["floor"] <= (0.0 if group["method"] == "quintic" else HIGHEST_FLOOR):
        raise ValueError(
            f"expected a floor in [0, {HIGHEST_FLOOR}], 0 with quintic; found {group['floor']} with {group['method']}"
        )
    named = dict(zip(group["param_names"], group["params"], strict=True))
    for name, parameter in named.items():
        if parameter.ndim != 2:
            raise ValueError(f"expected matrices for Muon; found {name} of shape {tuple(parameter.shape)}")
        mesh_dimensions(name, parameter)
    if group["qkv"] == "fused":
        return
    fused = {name: parameter.shape[0] for name, parameter in named.items() if name.endswith(FUSED_QKV)}
    if not fused:
        raise ValueError(f"expected parameters named *{FUSED_QKV} for qkv={group['qkv']!r}; found none")
    for name, rows in fused.items():
        if not group["heads"] or rows % (3 * group["heads"]) != 0:
            raise ValueError(f"expected 3 x heads to divide the {rows} rows of {name}; found heads={group['heads']}")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradient(parameter: nn.Parameter, *, is_noise: bool) -> Tensor:
    """This rank's part of a gradient; zeros if it is missing here, or nothing but rounding."""
    if parameter.grad is None or is_noise:
        return torch.zeros_like(_local(parameter))
    return _local(parameter.grad)


def _root_mean_squares(
    named: Sequence[tuple[str, nn.Parameter, dict[str, Any]]], layouts: Sequence[Layout]
) -> dict[str, float]:
    """That of each gradient that is there on some rank, the same on all; `UserError`, on every rank, if one of them is
    not finite. In float64, where no sum of squares overflows."""
    device = named[0][1].device
    local = [None if parameter.grad is None else _local(parameter.grad) for _, parameter, _ in named]
    there = [part for part in local if part is not None]
    norms = iter(torch._foreach_norm(there, 2, dtype=torch.float64) if there else ())
    zero = torch.zeros((), dtype=torch.float64, device=device)
    squares = torch.stack([zero if part is None else next(norms).square() for part in local])
    present = torch.tensor([part is not None for part in local], dtype=torch.float64).to(device)
    sums = torch.stack([present, squares])
    if world_size() > 1:
        dist.all_reduce(sums)
    found, totals = sums.tolist()
    _raise_unless_finite([name for (name, _, _), total in zip(named, totals, strict=True) if not math.isfinite(total)])
    return {
        name: math.sqrt(total / layout.replicas / parameter.numel())
        for (name, parameter, _), layout, count, total in zip(named, layouts, found, totals, strict=True)
        if count > 0
    }


def _raise_unless_finite(found: Sequence[str]) -> None:
    if found:
        raise UserError(
            f"expected finite gradients; found NaN or infinity in that of {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + ", before any weight was changed: lower the learning rates"
        )


def _sizes(matrices: Iterable[Matrix]) -> tuple[list[Matrix], list[Matrix]]:
    """The small ones, which every rank orthogonalises for itself, and the others. Not by the number of ranks.

    A batched product may round otherwise than a single one: the aspect keeps the blocks of a small model out, which so
    have the bits that they have when they are sharded.
    """
    small: list[Matrix] = []
    large: list[Matrix] = []
    for matrix in matrices:
        short, long = sorted(matrix.shape)
        thin = short <= SMALL_SIDE and long > BLOCK_ASPECT * short
        (small if thin and not matrix.divided and not matrix.layout.sharded else large).append(matrix)
    return small, large


def _batches(matrices: Iterable[Matrix]) -> Iterator[Sequence[Matrix]]:
    """Matrices of one shape and one group, in batches; `quintic`, for torch's bits, one by one."""
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape, id(matrix.settings)), []).append(matrix)
    for group in alike.values():
        size = 1 if group[0].settings["method"] == "quintic" else BATCH
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _update_batch(matrices: Sequence[Matrix]) -> None:
    """Update small matrices of one shape on every rank."""
    first = matrices[0]
    directions = first.weight.new_empty(len(matrices), *first.shape, dtype=first.wire)
    for matrix, direction in zip(matrices, directions, strict=True):
        matrix.advance(direction)
    several = directions if len(matrices) > 1 else directions[0]
    method, floor, steps = first.settings["method"], first.settings["floor"], first.settings["steps"]
    updates = polar_factor(several, method, floor=floor, steps=steps).reshape(directions.shape)
    for matrix, update in zip(matrices, updates, strict=True):
        matrix.update(update)
