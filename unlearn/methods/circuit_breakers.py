"""Circuit breakers (Zou et al. 2024, https://arxiv.org/abs/2406.04313): on forget text turn the residual streams away
from the original's; on retain text hold them where they were.

    F = mean over layers and tokens of relu(cos(h[l], h_original[l])),   R = mean of |h[l] - h_original[l]|
    loss = remove_coef (1 - s / 2) F + retain_coef s R

Before the first step the model is the original: the cosine is 1, its greatest value, and its gradient is rounding.
Which way the streams turn first is chance: two runs that add in another order part from the first step on.

Shapes: N real tokens of a micro-batch, D hidden size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unlearn.batches import Rows
from unlearn.config import RETAINS, LayerFlags, RetainFlags
from unlearn.flags import flag
from unlearn.methods.retain import hold
from unlearn.methods.terms import Cost, Needs, Numbers, OnStreams, Parts, Term, falling
from unlearn.model import residual_streams

TUNING = ("remove-coef=3,10,30", "retain-coef=1,5,20")


@dataclass(frozen=True, kw_only=True)
class Flags(LayerFlags, RetainFlags):
    """Circuit breakers: turn the residual streams of forget text away from the original's."""

    layers: tuple[int, ...] = (10, 20)
    """Target layers. Published: 10 20."""
    remove_coef: float = flag(10.0, above=0.0)
    """Weight of the forget loss; falls to half over the run. Published: 10."""
    retain_coef: float | None = flag(5.0, least=0.0)
    """Weight of the retain loss at the end of the run. Published: 5 (10 times s / 2)."""
    retain_loss: Literal["kl", "l2", "mse", "next-token"] | None = flag(published="l2", only=RETAINS)
    """l2: distance of the streams (published); mse: mean square of it; kl, next-token: by predictions."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""

    def reroute(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = residual_streams(original, rows.input_ids, flags.layers)

        def turn(layer: int, stream: Tensor) -> tuple[Tensor, Numbers]:
            cosine = cosine_similarity(rows.at_real(stream).float(), rows.at_real(kept.pop(layer)).float(), dim=-1)
            return rows.mean(cosine.relu()) / len(flags.layers), {f"cosine/{layer}": rows.mean(cosine).detach()}

        return OnStreams(residual_streams(parts.model, rows.input_ids, flags.layers), turn)

    needs = Needs(deepest=max(flags.layers), original=True, kept=len(flags.layers))
    forget = Term("forget", parts.batches["forget"], reroute, falling(flags.remove_coef, by=0.5), needs)
    return [forget, *hold(flags, parts, flags.layers)]
