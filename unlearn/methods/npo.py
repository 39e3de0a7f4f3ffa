"""Negative preference optimisation (Zhang et al. 2024, https://arxiv.org/abs/2404.05868): make forget text less likely
than it was to the original, the less eagerly the further it has come.

    F = mean over sequences of -(2 / b) log sigmoid(b (NLL(sequence) - NLL_original(sequence))), NLL summed over tokens

A sequence is a window. The sum makes b depend on its length. Published: b = 0.1, learning rate 1e-5 (TOFU); 0.01 and
4e-5 for a 6.9 B model on WMDP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unlearn.batches import Rows
from unlearn.config import OutputRetainFlags
from unlearn.flags import flag
from unlearn.methods.retain import hold, through_both_heads
from unlearn.methods.terms import Cost, Needs, Parts, Plain, Term
from unlearn.model import final_hidden, softcap
from unlearn.output_losses import preference, sequence_loss, sequence_losses

TUNING = ("remove-coef=0.3,1,3", "beta=0.01,0.05,0.1")


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """Negative preference optimisation on forget text, hold retain text."""

    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the forget loss, a mean over sequences. Published: 1."""
    beta: float = flag(0.1, above=0.0)
    """Inverse temperature b of a sequence's summed log-probability. Published: 0.1; 0.01 for a 6.9 B model."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    model, cap = parts.model, softcap(parts.model)

    def avoid(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = final_hidden(original, rows.input_ids, rows.at_leading)
        hidden = final_hidden(model, rows.input_ids, rows.at_leading)

        def read(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            before = sequence_losses(kept, kept_matrix, rows, cap)
            return sequence_loss(live, matrix, rows, lambda nll: preference(nll - before, flags.beta), softcap=cap)

        return Plain(through_both_heads(model, hidden, original, kept, read))

    forget = Term(
        "forget", parts.batches["forget"], avoid, lambda s: flags.remove_coef, needs=Needs(original=True, apart=True)
    )
    return [forget, *hold(flags, parts, ())]
