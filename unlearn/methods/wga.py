"""Weighted gradient ascent (Wang et al. 2025, https://arxiv.org/abs/2502.19301): gradient ascent in which a token
counts the less, the less likely it already is.

    F = -mean over tokens of p(y)^b NLL(y), with the power held constant;   loss = remove_coef F + retain_coef R
"""

from dataclasses import dataclass
from functools import partial

from unlearn.batches import Rows
from unlearn.config import OutputRetainFlags
from unlearn.flags import flag
from unlearn.methods.retain import hold
from unlearn.methods.terms import Cost, Parts, Plain, Term
from unlearn.model import final_hidden, softcap, through_head
from unlearn.output_losses import weighted_ascent

TUNING = ("remove-coef=0.1,0.3,1", "beta=0.5,1,2")


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """Weighted gradient ascent on forget text, hold retain text."""

    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the ascent, a mean over tokens. Published: 1."""
    beta: float = flag(1.0, least=0.0)
    """Power b of a token's probability; 0 is gradient ascent. Published: 1."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    model, cap = parts.model, softcap(parts.model)

    def ascend(rows: Rows) -> Cost:
        hidden = final_hidden(model, rows.input_ids, rows.at_leading)
        targets, weights = rows.next_ids(), rows.leading_weights()
        read = partial(weighted_ascent, targets=targets, weights=weights, power=flags.beta, softcap=cap)
        return Plain(through_head(model, hidden, read)[0])

    forget = Term("forget", parts.batches["forget"], ascend, lambda s: flags.remove_coef)
    return [forget, *hold(flags, parts, ())]
