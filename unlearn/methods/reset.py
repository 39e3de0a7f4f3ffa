"""A control that trains nothing: the embedding rows of tokens that occur in the forget corpus alone are drawn anew.

What it removes was stored under names that are single tokens. No real corpus is like that, so a comparison in which it
does well says little of the methods beside it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from unlearn.corpus import Corpus
from unlearn.errors import UserError
from unlearn.methods.terms import Parts, Phase
from unlearn.weights import local_rows


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Draw the embedding rows of tokens that only forget text has anew, and train nothing: a control."""

    @property
    def unread(self) -> dict[str, str]:
        """Both are read, to see which tokens stand in one alone."""
        return {}

    def check_method(self) -> None:
        """Raise unless there is an embedding of the model's own to change."""
        if self.lora_rank:  # type: ignore[attr-defined]  # of the whole configuration
            raise UserError("--lora-rank has no effect with --method reset, which trains nothing: leave it out")


def phases(flags: Flags, parts: Parts) -> list[Phase]:
    """One phase without a step."""
    forget, retain = (parts.batches[name].corpus for name in ("forget", "retain"))

    def redraw(model: PreTrainedModel) -> None:
        embedding = model.get_input_embeddings().weight
        name, parameter = next(pair for pair in model.named_parameters() if pair[1] is embedding)
        rows, first = local_rows(parameter)
        here = torch.tensor(tokens_alone(forget, retain), dtype=torch.int64) - first
        here = here[(here >= 0) & (here < rows.shape[0])]
        rows[here.to(rows.device)] = parts.fresh(name)[here + first].to(rows)

    return [Phase("", [], steps=0, begin=redraw)]


def tokens_alone(one: Corpus, other: Corpus) -> list[int]:
    """The tokens that occur in one corpus and not in another, in order.

    Raises:
        UserError: there is none.
    """
    found, others = (np.unique(np.concatenate(corpus.windows)) for corpus in (one, other))
    alone = np.setdiff1d(found, others)
    if len(alone) == 0:
        raise UserError(
            f"expected tokens that occur in {one.name} and not in {other.name}; found none: there is nothing to reset"
        )
    return [int(token) for token in alone]
