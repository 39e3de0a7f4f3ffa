"""Tuned-lens unlearning: the forget loss read through a frozen lens, the retain loss against the original model.

    loss = remove(s) F + retain(s) R,  s = step / (steps - 1)
    remove(s) = remove_coef (1 - 0.25 s),  retain(s) = retain_coef (retain_start + (1 - retain_start) s)

F and R are token-weighted means over the *global* batch: each rank divides by the global batch's token count, which
it knows without asking, and the gradients are summed over ranks. One backward a loss term and micro-batch.

Shapes: B rows, S positions, N real tokens among them, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.data import Batches, Rows
from unlearn.lens import TunedLens
from unlearn.lora import lora_disabled, set_dropout_rows
from unlearn.losses import kl_divergence, l2_distance, next_token, uniform_per_token
from unlearn.model import final_norm, residual_streams, softcap, unembedding
from unlearn.seeding import random_bits

Reference = Callable[[], AbstractContextManager[PreTrainedModel]]  # the original model, for the length of a block


@dataclass(frozen=True)
class Coefficients:
    """The weights of the two losses over a run."""

    remove: float
    retain: float
    retain_start: float
    steps: int

    def at(self, step: int) -> tuple[float, float]:
        """(remove, retain) at an optimizer step."""
        s = step / max(1, self.steps - 1)
        return self.remove * (1.0 - 0.25 * s), self.retain * (self.retain_start + (1.0 - self.retain_start) * s)


@dataclass(frozen=True)
class LensObjective:
    """What a global batch of forget and retain windows costs.

    Attributes:
        model: the model in training.
        lens: of the original model.
        reference: gives the original model.
        layers: target layers l. tap: whether translator l reads h[l] (input) or h[l + 1] (output).
        micro_batch: rows of one forward pass.
        autocast: the precision of forward passes.
    """

    model: PreTrainedModel
    lens: TunedLens
    reference: Reference
    forget: Batches | None
    retain: Batches | None
    coefficients: Coefficients
    layers: tuple[int, ...]
    tap: Literal["input", "output"]
    forget_loss: Literal["uniform", "sampled", "gradient-ascent"]
    retain_loss: Literal["kl", "l2"]
    micro_batch: int
    autocast: Callable[[], AbstractContextManager[object]]

    @property
    def _shift(self) -> int:
        """How far above h[l] translator l reads."""
        return 1 if self.tap == "output" else 0

    def settings(self, step: int) -> dict[str, float]:
        """The coefficients of a step."""
        remove, retain = self.coefficients.at(step)
        return {"remove_coef": remove, "retain_coef": retain}

    def backward(self, step: int) -> Mapping[str, Tensor | float]:
        """Add this rank's gradients of one global batch; return its share of losses and statistics."""
        remove, retain = self.coefficients.at(step)
        device = self.lens.unembedding.device
        metrics: dict[str, Tensor] = dict.fromkeys(self._keys(), torch.zeros((), device=device))
        if self.forget is not None:
            for rows in self.forget.micro_batches(step, self.micro_batch, device):
                loss, statistics = self._forget(self.forget, rows, step)
                (remove * loss).backward()
                _add(metrics, statistics)
        if self.retain is not None:
            for rows in self.retain.micro_batches(step, self.micro_batch, device):
                loss, statistics = self._retain(self.retain.tokens(step), rows, training=retain > 0.0)
                if retain > 0.0:
                    (retain * loss).backward()
                _add(metrics, statistics)
        zero = torch.zeros((), device=device)
        metrics["loss"] = remove * metrics.get("forget_loss", zero) + retain * metrics.get("retain_loss", zero)
        return metrics

    def _keys(self) -> Iterator[str]:
        yield "tokens"
        if self.forget is not None:
            yield "forget_loss"
            for layer in self.layers:
                yield f"uniform_loss/{layer}"
                yield f"entropy/{layer}"
        if self.retain is not None:
            yield "retain_loss"

    def _forget(self, batches: Batches, rows: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of F, [] float32, and of each layer's uniform loss and entropy."""
        set_dropout_rows(self.model, rows.keys)
        with self.autocast():
            streams = residual_streams(self.model, rows.input_ids, [layer + self._shift for layer in self.layers])
        total = torch.zeros((), device=rows.input_ids.device)
        tokens = batches.tokens(step)
        statistics = {"tokens": rows.mask.sum()}
        for layer in self.layers:
            hidden = self.lens.hidden(streams[layer + self._shift][rows.mask], layer)
            if self.forget_loss == "uniform":
                losses, entropy = uniform_per_token(hidden, self.lens.unembedding, softcap=self.lens.softcap)
                total = total + losses.sum() / tokens
            else:
                with torch.no_grad():
                    losses, entropy = uniform_per_token(hidden, self.lens.unembedding, softcap=self.lens.softcap)
                total = total + self._against_tokens(streams[layer + self._shift], layer, rows, batches, step)
            statistics[f"uniform_loss/{layer}"] = losses.detach().sum() / tokens
            statistics[f"entropy/{layer}"] = entropy.sum() / tokens
        total = total / len(self.layers)
        return total, statistics | {"forget_loss": total.detach()}

    def _against_tokens(self, stream: Tensor, layer: int, rows: Rows, batches: Batches, step: int) -> Tensor:
        """This micro-batch's share of the cross-entropy against sampled tokens, or minus that of the true ones."""
        vocabulary = self.lens.unembedding.shape[0]
        scale = 1.0 / math.log(vocabulary)
        if self.forget_loss == "sampled":
            draws = random_bits(rows.keys ^ layer, rows.input_ids.shape[1])[:, :, 0] % vocabulary
            hidden, targets = self.lens.hidden(stream[rows.mask], layer), draws[rows.mask].long()
            scale /= batches.tokens(step)
        else:
            hidden = self.lens.hidden(stream[:, :-1][rows.next_mask], layer)
            targets = rows.input_ids[:, 1:][rows.next_mask]
            scale /= -batches.targets(step)
        weights = torch.full(targets.shape, scale, device=hidden.device)
        return next_token(hidden, self.lens.unembedding, targets, weights, softcap=self.lens.softcap)[0]

    def _retain(self, tokens: int, rows: Rows, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of R, [] float32, where the global batch has `tokens` retain tokens."""
        final = int(self.model.config.num_hidden_layers)
        layers = [final] if self.retain_loss == "kl" else [layer + self._shift for layer in self.layers]
        with torch.no_grad(), self.autocast(), self.reference() as original:
            kept = residual_streams(original, rows.input_ids, layers)
            kept_hidden = final_norm(original)(kept[final][rows.mask]) if self.retain_loss == "kl" else None
            kept_matrix = unembedding(original).detach()
        set_dropout_rows(self.model, rows.keys)
        with torch.set_grad_enabled(training), self.autocast():
            streams = residual_streams(self.model, rows.input_ids, layers)
            if kept_hidden is not None:
                hidden = final_norm(self.model)(streams[final][rows.mask])
                weights = torch.full(hidden.shape[:1], 1.0 / tokens, device=hidden.device)
                total = kl_divergence(
                    hidden, unembedding(self.model), kept_hidden, kept_matrix, weights, softcap=softcap(self.model)
                )[0]
            else:
                pairs = [(streams[layer][rows.mask], kept[layer][rows.mask]) for layer in layers]
                distances = torch.stack([l2_distance(live, original).sum() for live, original in pairs])
                total = distances.sum() / (tokens * len(layers))
        return total, {"tokens": rows.mask.sum(), "retain_loss": total.detach()}


def _add(metrics: dict[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
    for key, value in statistics.items():
        metrics[key] = metrics[key] + value


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A `Reference` of LoRA training: the model itself, with its adapters switched off."""
    with lora_disabled(model):
        yield model
