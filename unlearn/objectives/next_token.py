"""Plain language modelling: cross-entropy of the next token, as the fine-tuning attack trains."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.data import Batches
from unlearn.losses import next_token
from unlearn.model import final_norm, residual_streams, softcap, through_head
from unlearn.sharding import all_reducing_last


@dataclass(frozen=True)
class NextTokenObjective:
    """Mean next-token cross-entropy, in nats, over every position of the global batch that has a next token.

    Attributes:
        batches: the corpus.
        autocast: the precision of forward passes.
    """

    model: PreTrainedModel
    batches: Batches
    autocast: Callable[[], AbstractContextManager[object]]

    def settings(self, step: int) -> dict[str, float]:
        """Nothing that changes over a run."""
        return {}

    def terms(self, step: int) -> Iterator[Mapping[str, Tensor | float]]:
        """One term: add this rank's gradients of one global batch, then yield its share of the loss."""
        parameter = next(self.model.parameters())
        loss = torch.zeros((), device=parameter.device)
        tokens = torch.zeros((), device=parameter.device)
        targets = self.batches.targets(step)
        final = int(self.model.config.num_hidden_layers)
        for rows in all_reducing_last(self.model, self.batches.micro_batches(step, parameter.device)):
            with self.autocast():
                stream = residual_streams(self.model, rows.input_ids, [final])[final]
                hidden = final_norm(self.model)(rows.at_leading(stream))
                wanted = rows.next_ids()
                weights = torch.full(wanted.shape, 1.0 / targets, device=wanted.device)
                read = partial(next_token, targets=wanted, weights=weights, softcap=softcap(self.model))
                share, _ = through_head(self.model, hidden, read)
            share.backward()
            loss, tokens = loss + share.detach(), tokens + rows.tokens
        yield {"tokens": tokens, "loss": loss}
