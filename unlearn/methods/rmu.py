"""RMU (Li et al. 2024, https://arxiv.org/abs/2403.03218): on forget text push one layer's residual stream towards a
fixed random direction; on retain text hold it where the original has it.

    F = mean over tokens of |h[l] - c u|^2 / D,   R = mean over tokens of |h[l] - h_original[l]|^2 / D,   loss = F + a R

with u a random unit vector of elements drawn from [0, 1). Published for Zephyr-7B: l = 7, c = 6.5, a = 1200, learning
rate 5e-5, and only three layers' MLPs trained; here every matrix is, or adapters are.

Shapes: N real tokens of a micro-batch, D hidden size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unlearn.batches import Rows
from unlearn.config import RETAINS, SCHEDULED, LayerFlags, RetainFlags
from unlearn.flags import flag
from unlearn.methods.retain import hold
from unlearn.methods.terms import Cost, Needs, Numbers, OnStreams, Parts, Term
from unlearn.model import residual_streams
from unlearn.seeding import generator

TUNING = ("steering=2,6.5,20", "retain-coef=10,100,1200")


@dataclass(frozen=True, kw_only=True)
class Flags(LayerFlags, RetainFlags):
    """RMU: misdirect the residual stream of forget text, hold that of retain text."""

    layers: tuple[int, ...] = (7,)
    """Target layers l: the residual stream that enters block l. Published: 7."""
    steering: float = flag(6.5, above=0.0)
    """Length c of the random direction. Published: 6.5."""
    retain_coef: float | None = flag(1200.0, least=0.0)
    """Weight a of the retain loss. Published: 1200."""
    retain_loss: Literal["kl", "l2", "mse", "next-token"] | None = flag(published="mse", only=RETAINS)
    """mse: mean square of the streams' difference (published); l2: their distance; kl, next-token: by predictions."""
    retain_start: float = flag(1.0, least=0.0, most=1.0, only=(RETAINS, SCHEDULED))
    """Share of --retain-coef at the first step, from which it rises linearly. Published: 1."""
    adam_lr: float | None = flag(5e-5, above=0.0)
    """Peak learning rate of AdamW. Published: 5e-5."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    u = torch.rand(parts.model.config.hidden_size, generator=generator(parts.seed, "rmu"))  # [D]
    goal = (flags.steering * u / u.norm()).to(parts.device)

    def misdirect(rows: Rows) -> Cost:
        def loss(layer: int, stream: Tensor) -> tuple[Tensor, Numbers]:
            distances = (rows.at_real(stream).float() - goal).square().mean(dim=-1)  # [N]
            return rows.mean(distances) / len(flags.layers), {}

        return OnStreams(residual_streams(parts.model, rows.input_ids, flags.layers), loss)

    forget = Term("forget", parts.batches["forget"], misdirect, needs=Needs(deepest=max(flags.layers)))
    return [forget, *hold(flags, parts, flags.layers)]
