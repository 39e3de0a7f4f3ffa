"""SimNPO (Fan et al. 2024, https://arxiv.org/abs/2410.07163): NPO without the original, by the mean over a sequence.

    F = mean over sequences of -(2 / b) log sigmoid(b (NLL(sequence) - d)),   NLL the mean over the sequence's tokens

A sequence is a window. Published: b = 4.5, d = 0, weight 0.125, learning rate 1e-5 (TOFU, open-unlearning); b = 0.01,
3e-5 for a 6.9 B model on WMDP.
"""

from dataclasses import dataclass

from torch import Tensor

from unlearn.batches import Rows
from unlearn.config import OutputRetainFlags
from unlearn.flags import flag
from unlearn.methods.retain import hold
from unlearn.methods.terms import Cost, Parts, Plain, Term
from unlearn.model import final_hidden, softcap, through_head
from unlearn.output_losses import preference, sequence_loss

TUNING = ("remove-coef=0.125,0.5,2", "beta=0.1,1,4.5")


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """SimNPO on forget text, hold retain text."""

    remove_coef: float = flag(0.125, above=0.0)
    """Weight of the forget loss, a mean over sequences. Published: 0.125."""
    beta: float = flag(4.5, above=0.0)
    """Inverse temperature b of a sequence's mean log-probability. Published: 4.5; 0.01 for a 6.9 B model."""
    margin: float = 0.0
    """Margin d that the sequence's mean loss, in nats, is to exceed. Published: 0."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    model, cap = parts.model, softcap(parts.model)

    def avoid(rows: Rows) -> Cost:
        hidden, lengths = final_hidden(model, rows.input_ids, rows.at_leading), rows.lengths().clamp(min=1.0)

        def loss(nll: Tensor) -> Tensor:
            return preference(nll / lengths - flags.margin, flags.beta)

        def read(live: Tensor, matrix: Tensor) -> Tensor:
            return sequence_loss(live, matrix, rows, loss, softcap=cap)

        return Plain(through_head(model, hidden, read))

    forget = Term("forget", parts.batches["forget"], avoid, lambda s: flags.remove_coef)
    return [forget, *hold(flags, parts, ())]
