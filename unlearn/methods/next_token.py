"""Plain language modelling: mean next-token cross-entropy in nats, as the fine-tuning attack trains."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from unlearn.data import Batches, Rows
from unlearn.losses import next_token
from unlearn.methods.terms import Cost, Plain, Term
from unlearn.model import final_hidden, softcap, through_head


def terms(model: PreTrainedModel, batches: Batches) -> list[Term]:
    """One term: the mean over every token of the global batch that has a next one."""
    return [Term("text", batches, prediction(model))]


def prediction(model: PreTrainedModel) -> Callable[[Rows], Cost]:
    """Cross-entropy of the next token."""

    def cost(rows: Rows) -> Cost:
        hidden = final_hidden(model, rows.input_ids, rows.at_leading)  # [M, D]
        targets, weights = rows.next_ids(), rows.leading_weights()
        read = partial(next_token, targets=targets, weights=weights, softcap=softcap(model))
        return Plain(through_head(model, hidden, read)[0])

    return cost
