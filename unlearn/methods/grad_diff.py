"""Gradient difference (Liu et al. 2022, https://arxiv.org/abs/2203.12817; settings: open-unlearning's): make the next
tokens of forget text unlikely, and hold retain text.

    loss = retain_coef R - remove_coef NLL(forget), NLL the mean over the tokens of the global batch

With --retain-coef 0 it is gradient ascent. The ascent has no bound: the model's other text follows it down.
"""

from dataclasses import dataclass

from unlearn.config import OutputRetainFlags
from unlearn.flags import flag
from unlearn.methods.retain import hold, prediction
from unlearn.methods.terms import Parts, Term

TUNING = ("remove-coef=0.03,0.1,0.3,1",)


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """Gradient difference: ascend the next-token loss of forget text, hold retain text."""

    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the ascent, a mean over tokens. Published: 1."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    forget = Term("forget", parts.batches["forget"], prediction(parts.model), lambda s: -flags.remove_coef)
    return [forget, *hold(flags, parts, ())]
