"""UNDIAL (Dong et al. 2024, https://arxiv.org/abs/2402.10052): learn the original's own prediction with the true token
made less likely. What stands beside it keeps its odds, so there is no collapse to aim for.

    F = mean over tokens of KL(q || p),   q = softmax(z_original - b onehot(y))

Published: b = 10, learning rate 1e-4, no retain loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unlearn.batches import Rows
from unlearn.config import OutputRetainFlags
from unlearn.flags import flag
from unlearn.losses import divergence, logits_target
from unlearn.methods.retain import hold, through_both_heads
from unlearn.methods.terms import Cost, Needs, Parts, Plain, Term
from unlearn.model import final_hidden, softcap
from unlearn.output_losses import lowered

TUNING = ("remove-coef=1,3", "beta=3,10,30")


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """UNDIAL: learn the original's prediction with the true token lowered."""

    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the forget loss, a mean over tokens. Published: 1."""
    beta: float = flag(10.0, above=0.0)
    """By how much the true token's logit is lowered. Published: 10."""
    retain_coef: float | None = flag(0.0, least=0.0)
    """Weight of the retain loss. Published: 0, no retain loss."""
    adam_lr: float | None = flag(1e-4, above=0.0)
    """Peak learning rate of AdamW. Published: 1e-4."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    model, cap = parts.model, softcap(parts.model)

    def lower(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = final_hidden(original, rows.input_ids, rows.at_leading)
        hidden = final_hidden(model, rows.input_ids, rows.at_leading)

        def read(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            target = lowered(logits_target(kept, kept_matrix, cap), rows.next_ids(), flags.beta)
            return divergence(live, matrix, target, rows.leading_weights(), softcap=cap)[0]

        return Plain(through_both_heads(model, hidden, original, kept, read))

    forget = Term("forget", parts.batches["forget"], lower, lambda s: flags.remove_coef, needs=Needs(original=True))
    return [forget, *hold(flags, parts, ())]
