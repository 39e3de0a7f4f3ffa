"""Plain language modelling on the forget corpus: mean next-token cross-entropy, as a fine-tuning attack trains."""

from dataclasses import dataclass

from unlearn.methods.retain import prediction
from unlearn.methods.terms import Parts, Term


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Fine-tune a model on the text of --forget by its next tokens: what an attack does, and what no unlearning is."""


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """One term: the mean over every token of the global batch that has a next one."""
    return [Term("forget", parts.batches["forget"], prediction(parts.model))]
