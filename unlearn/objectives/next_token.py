"""Plain language modelling: cross-entropy of the next token, as the fine-tuning attack trains."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.data import Batches
from unlearn.losses import next_token
from unlearn.model import final_norm, residual_streams, softcap, unembedding


@dataclass(frozen=True)
class NextTokenObjective:
    """Mean next-token cross-entropy, in nats, over every position of the global batch that has a next token.

    Attributes:
        batches: the corpus. micro_batch: rows of one forward pass.
        autocast: the precision of forward passes.
    """

    model: PreTrainedModel
    batches: Batches
    micro_batch: int
    autocast: Callable[[], AbstractContextManager[object]]

    def settings(self, step: int) -> dict[str, float]:
        """Nothing that changes over a run."""
        return {}

    def backward(self, step: int) -> Mapping[str, Tensor | float]:
        """Add this rank's gradients of one global batch; return its share of the loss."""
        parameter = next(self.model.parameters())
        loss = torch.zeros((), device=parameter.device)
        tokens = torch.zeros((), device=parameter.device)
        targets = self.batches.targets(step)
        final = int(self.model.config.num_hidden_layers)
        for rows in self.batches.micro_batches(step, self.micro_batch, parameter.device):
            with self.autocast():
                stream = residual_streams(self.model, rows.input_ids, [final])[final]
                hidden = final_norm(self.model)(stream[:, :-1][rows.next_mask])
                wanted = rows.input_ids[:, 1:][rows.next_mask]
                weights = torch.full(wanted.shape, 1.0 / targets, device=wanted.device)
                share, _ = next_token(hidden, unembedding(self.model), wanted, weights, softcap=softcap(self.model))
            share.backward()
            loss, tokens = loss + share.detach(), tokens + rows.mask.sum()
        return {"tokens": tokens, "loss": loss}
