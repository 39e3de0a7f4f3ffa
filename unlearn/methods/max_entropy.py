"""Maximum entropy: push the model's own prediction on forget text towards uniform.

    F = mean over tokens of KL(u || p) = logsumexp z - mean z - ln V   (from-uniform)
                         or KL(p || u) = ln V - entropy(p)             (to-uniform, https://arxiv.org/abs/2410.08109)

or the same of the K likeliest tokens, among which p is normalised. Both are 0 at a uniform prediction. The one pushes
hardest at tokens that are far too unlikely, the other at those that are too likely.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from unlearn.batches import Rows
from unlearn.config import OutputRetainFlags
from unlearn.errors import UserError
from unlearn.flags import flag
from unlearn.methods.retain import hold
from unlearn.methods.terms import Cost, Parts, Plain, Term
from unlearn.model import final_hidden, softcap, through_head
from unlearn.output_losses import entropy_gap

TUNING = ("remove-coef=0.1,0.3,1,3", "divergence=from-uniform,to-uniform")


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """Push the prediction on forget text towards uniform, hold retain text."""

    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the divergence, a mean over tokens in nats."""
    divergence: Literal["from-uniform", "to-uniform"] = "from-uniform"
    """from-uniform: KL(uniform || prediction); to-uniform: KL(prediction || uniform)."""
    top: int | None = flag(least=2)
    """Only among the K likeliest tokens. Default: all of them."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    model, cap, vocabulary = parts.model, softcap(parts.model), int(parts.model.config.vocab_size)
    if flags.top is not None and flags.top > vocabulary:
        raise UserError(f"expected --top of at most {vocabulary:,}, the size of the vocabulary; found {flags.top:,}")

    def flatten(rows: Rows) -> Cost:
        hidden = final_hidden(model, rows.input_ids, rows.at_real)
        from_uniform = flags.divergence == "from-uniform"
        read = partial(entropy_gap, weights=rows.weights(), from_uniform=from_uniform, top=flags.top, softcap=cap)
        return Plain(through_head(model, hidden, read)[0])

    forget = Term("forget", parts.batches["forget"], flatten, lambda s: flags.remove_coef)
    return [forget, *hold(flags, parts, ())]
