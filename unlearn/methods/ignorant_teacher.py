"""Learn the predictions of a teacher that does not know: of another checkpoint (a filtered model, an early one), or of
the original itself where a prefix makes it a novice (ELM, Gandikota et al. 2024, https://arxiv.org/abs/2410.02760).

    F = mean over tokens of KL(q || p),   q = p_teacher(. | x)
        or q ~ p_original(. | x) (p_original(. | novice, x) / p_original(. | expert, x))^eta

The optimum predicts as a model would that never read the text, and not uniformly. ELM's loss that the text stays fluent
is not here: it needs text that the model writes. ELM's prefixes are those of its figure 1.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.batches import Rows
from unlearn.config import RETAINS, OutputRetainFlags
from unlearn.errors import UserError
from unlearn.flags import Only, flag
from unlearn.losses import divergence, logits_target
from unlearn.methods.retain import by_prediction, hold, through_both_heads
from unlearn.methods.terms import Cost, Needs, Parts, Plain, Term
from unlearn.model import final_hidden, softcap
from unlearn.output_losses import contrasted

TUNING = ("remove-coef=0.3,1,3",)


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """Learn what a teacher predicts that does not know."""

    teacher: str | None = None
    """Model that does not know, a local folder or hub name. Default: the original as a novice, by the prefixes."""
    novice: str = flag("As a novice in bioweapons:", only=Only(lambda flags: flags.teacher is None, "with --teacher"))
    """Prefix under which the original is to know nothing. Published: As a novice in bioweapons:"""
    expert: str = flag("As an expert in bioweapons:", only=Only(lambda flags: flags.teacher is None, "with --teacher"))
    """Prefix under which it is to know. Published: As an expert in bioweapons:"""
    eta: float = flag(1000.0, above=0.0, only=Only(lambda flags: flags.teacher is None, "with --teacher"))
    """Strength of the contrast between both prefixes. Published: 1000."""
    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the forget loss, a mean over tokens. Published: 1."""
    retain_loss: Literal["kl", "next-token"] | None = flag(published="kl", only=RETAINS)
    """kl: KL(original || model) a token, in nats (published); next-token: cross-entropy of retain text itself."""
    adam_lr: float | None = flag(5e-5, above=0.0)
    """Peak learning rate of AdamW. Default: 5e-5, which is said of ELM and was not found in its code."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    if flags.teacher is not None:
        teacher = parts.teacher(flags.teacher)
        cost = by_prediction(dataclasses.replace(parts, original=lambda: nullcontext(teacher)))
        needs = Needs(teacher=sum(parameter.numel() for parameter in teacher.parameters()))
    else:
        cost, needs = novice_against_expert(flags, parts), Needs(original=True, more_forward=2.0)
    forget = Term("forget", parts.batches["forget"], cost, lambda s: flags.remove_coef, needs)
    return [forget, *hold(flags, parts, ())]


def novice_against_expert(flags: Flags, parts: Parts) -> Callable[[Rows], Cost]:
    """ELM's forget loss; the original reads the text alone, and behind either prefix."""
    model, cap = parts.model, softcap(parts.model)
    texts = (flags.novice, flags.expert)
    prefixes = [torch.tensor(parts.tokens(text), dtype=torch.int64, device=parts.device) for text in texts]
    for name, prefix in zip(("novice", "expert"), prefixes, strict=True):
        if len(prefix) == 0:
            raise UserError(f"expected --{name} to be a text of one token or more; found {getattr(flags, name)!r}")

    def cost(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            alone = final_hidden(original, rows.input_ids, rows.at_real)  # [N, D]
            kept = torch.cat([alone, *(behind(original, prefix, rows) for prefix in prefixes)])
        hidden = final_hidden(model, rows.input_ids, rows.at_real)

        def read(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            plain, novice, expert = (logits_target(part, kept_matrix, cap) for part in kept.chunk(3))
            target = contrasted(plain, novice, expert, flags.eta)
            return divergence(live, matrix, target, rows.weights(), softcap=cap)[0]

        return Plain(through_both_heads(model, hidden, original, kept, read))

    return cost


def behind(model: PreTrainedModel, prefix: Tensor, rows: Rows) -> Tensor:
    """The final hidden states [N, D] of the real tokens, read behind a prefix int64 [P]."""
    ahead = prefix.expand(rows.input_ids.shape[0], -1)
    ids = torch.cat([ahead, rows.input_ids], dim=1)  # [B, P + S]
    return final_hidden(model, ids, lambda streams: rows.at_real(streams[:, len(prefix) :]))
