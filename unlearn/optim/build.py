"""Who gets Muon, AdamW or SGD, and how learning rates move over a run.

A parameter's *role* decides, never its size: matrices inside the blocks and LoRA's A and B are Muon's; embeddings,
unembedding, norms and biases are AdamW's.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.model import blocks_prefix
from unlearn.optim.matrix import FUSED_QKV, Qkv
from unlearn.optim.muon import Muon
from unlearn.optim.newton_schulz import Method

BETAS, EPS = (0.9, 0.95), 1e-8

Schedule = Callable[[int], float]  # optimizer step -> factor of every peak learning rate


@dataclass(frozen=True)
class Roles:
    """Trainable parameters by role, with their names."""

    matrices: dict[str, nn.Parameter]
    embeddings: dict[str, nn.Parameter]
    vectors: dict[str, nn.Parameter]


def roles(model: PreTrainedModel) -> Roles:
    """Sort the trainable parameters: matrices inside the blocks; matrices outside; norms and biases."""
    found = Roles({}, {}, {})
    prefix = blocks_prefix(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            found.vectors[name] = parameter
        elif name.startswith(prefix):
            found.matrices[name] = parameter
        else:
            found.embeddings[name] = parameter
    return found


def build_optimizers(
    model: PreTrainedModel,
    *,
    optimizer: str,
    adam_lr: float | None,
    sgd_lr: float | None = None,
    muon_lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float = 0.01,
    method: Method = "gram",
    floor: float | None = None,
    qkv: Qkv = "fused",
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a run: {"adamw": ..}, {"sgd": ..} or {"muon": .., "adamw": ..}, without one that would get no
    parameter.

    Weight decay is for matrices and embeddings; norms and biases are left alone.

    Args:
        optimizer: `adamw`, `sgd` (without momentum) or `muon`.
        adam_lr, sgd_lr, muon_lr: peak learning rates of each.
        momentum, method, floor, qkv: of Muon.

    Raises:
        UserError: nothing is trainable; or Muon was asked for and no matrix is; or Q, K and V were to be taken apart
            and no matrix holds all three.
    """
    parts = roles(model)
    built: dict[str, torch.optim.Optimizer] = {}
    decayed = list(parts.embeddings.values())
    if optimizer == "muon":
        _check_matrices(parts.matrices, qkv)
        assert muon_lr is not None and momentum is not None
        built["muon"] = Muon(
            parts.matrices.items(),
            lr=muon_lr,
            momentum=momentum,
            weight_decay=weight_decay,
            method=method,
            floor=floor,
            qkv=qkv,
            heads=None if qkv == "fused" else model.config.num_attention_heads,
        )
    else:
        decayed = [*parts.matrices.values(), *decayed]
    groups = [(decayed, weight_decay), (list(parts.vectors.values()), 0.0)]
    filled = [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
    if filled and optimizer == "sgd":
        assert sgd_lr is not None
        built["sgd"] = torch.optim.SGD(filled, lr=sgd_lr, foreach=True)
    elif filled:
        assert adam_lr is not None
        built["adamw"] = torch.optim.AdamW(filled, lr=adam_lr, betas=BETAS, eps=EPS, fused=True)
    if not built:
        raise UserError("expected trainable parameters; found none: give --lora-rank or train in full")
    return built


def _check_matrices(matrices: Mapping[str, nn.Parameter], qkv: Qkv) -> None:
    """Raise unless Muon has something to orthogonalise, and to take apart if that was asked for."""
    if not matrices:
        raise UserError("expected matrices inside the blocks for Muon; found none trainable: use --optimizer adamw")
    if qkv != "fused" and not any(name.endswith(FUSED_QKV) for name in matrices):
        raise UserError(
            f"expected trainable matrices named *{FUSED_QKV} (GPT-NeoX in full training) for --muon-qkv {qkv}; "
            "found none: leave it out"
        )


def restart(optimizer: torch.optim.Optimizer) -> None:
    """Forget every step: AdamW makes its state in its first step, Muon's momenta are zeros from the start."""
    if isinstance(optimizer, Muon):
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
    else:
        optimizer.state.clear()


def assignment(model: PreTrainedModel, optimizers: Mapping[str, torch.optim.Optimizer]) -> list[str]:
    """Which parameters each optimizer got: a line for each kind of parameter, the blocks' numbers as `*`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: dict[tuple[str, str, str], list[nn.Parameter]] = {}
    for optimizer, built in optimizers.items():
        for parameter in (parameter for group in built.param_groups for parameter in group["params"]):
            kind = re.sub(r"\.\d+\.", ".*.", names[id(parameter)])
            rows.setdefault((optimizer, kind, str(list(parameter.shape))), []).append(parameter)
    return [
        f"{optimizer:6}{len(found):4} x {shape:16} {kind} ({sum(p.numel() for p in found):,} parameters)"
        for (optimizer, kind, shape), found in rows.items()
    ]


def linear_schedule(steps: int, warmup_ratio: float = 0.0, decay_ratio: float | None = None) -> Schedule:
    """Linear rise to 1, then linear fall towards 0, which the step after the last one would reach.

    Args:
        warmup_ratio: share of the steps that rise.
        decay_ratio: share of the steps that fall, at the end; by default all that do not rise.
    """
    rising = round(steps * warmup_ratio)
    falling = steps - rising if decay_ratio is None else round(steps * decay_ratio)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / rising if step < rising else 1.0, (steps - step) / max(1, falling))

    return factor


def make_schedule(kind: Literal["constant", "linear", "cosine"], steps: int, warmup_ratio: float = 0.0) -> Schedule:
    """Linear rise to 1 over the share `warmup_ratio` of the steps; then 1, or a fall towards 0, which the step after
    the last one would reach: along a line, or along half a cosine (https://arxiv.org/abs/1608.03983, equation 5)."""
    if kind != "cosine":
        return linear_schedule(steps, warmup_ratio, decay_ratio=0.0 if kind == "constant" else None)
    rising = round(steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return (1.0 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2.0

    return factor


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set each parameter group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
