"""Tuned-lens unlearning: the forget loss read through a frozen lens, the retain loss against the original model.

    loss = remove(s) F + retain(s) R,  s = step / (steps - 1)
    remove(s) = remove_coef (1 - 0.25 s),  retain(s) = retain_coef (retain_start + (1 - retain_start) s)

F and R are token-weighted means over the *global* batch: each rank divides by the global batch's token count, which
it knows without asking, and the gradients are summed over ranks. One backward a loss term and micro-batch.

A loss on residual streams is differentiated in two stages. What lies behind the streams is frozen, so the loss of each
target layer and its gradient dL/dh are computed on the stream *detached*, a chunk of tokens at a time, in the moment in
which the one backward through the model comes by. The same gradient as through the joint graph, without any of the
lens's graph in memory beside the model's, and with one layer's dL/dh at a time.

Shapes: B rows, S positions, N real tokens among them, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.data import Batches, Rows
from unlearn.lens import TunedLens
from unlearn.lora import lora_disabled, set_dropout_rows
from unlearn.losses import kl_divergence, l2_distance, next_token, uniform_per_token
from unlearn.model import final_norm, residual_streams, softcap, through_head
from unlearn.seeding import random_bits
from unlearn.sharding import all_reducing_last, reshard

Measured = tuple[Tensor, dict[str, Tensor]]  # a share of a loss, [] float32, and of what is logged of it
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
    autocast: Callable[[], AbstractContextManager[object]]

    @property
    def _shift(self) -> int:
        """How far above h[l] translator l reads."""
        return 1 if self.tap == "output" else 0

    def settings(self, step: int) -> dict[str, float]:
        """The coefficients of a step."""
        remove, retain = self.coefficients.at(step)
        return {"remove_coef": remove, "retain_coef": retain}

    def terms(self, step: int) -> Iterator[Mapping[str, Tensor | float]]:
        """The forget term, then the retain term: add this rank's gradients of the global batch, then yield its share
        of losses and statistics."""
        remove, retain = self.coefficients.at(step)
        device = self.lens.unembedding.device
        if self.forget is not None:
            metrics: dict[str, Tensor] = {}
            alone = self.retain is None or retain == 0.0
            for rows in all_reducing_last(self.model, self.forget.micro_batches(step, device), ends_step=alone):
                _add(metrics, self._forget(self.forget, rows, step, remove))
            yield metrics | {"loss": remove * metrics["forget_loss"]}
        if self.retain is not None:
            metrics = {}
            share = self._retain_kl if self.retain_loss == "kl" else self._retain_l2
            for rows in all_reducing_last(self.model, self.retain.micro_batches(step, device)):
                _add(metrics, {"tokens": _number(rows), "retain_loss": share(self.retain.tokens(step), rows, retain)})
            yield metrics | {"loss": retain * metrics["retain_loss"]}

    def _forget(self, batches: Batches, rows: Rows, step: int, coefficient: float) -> dict[str, Tensor]:
        """Backward of `coefficient` times this micro-batch's share of F; its share of F and of each layer's uniform
        loss and entropy, [] float32."""
        set_dropout_rows(self.model, rows.keys)
        with self.autocast():
            streams = residual_streams(self.model, rows.input_ids, [layer + self._shift for layer in self.layers])

        def loss(layer: int, stream: Tensor) -> Measured:
            return self.layer_loss(stream, layer - self._shift, rows, batches, step)

        total, statistics = backward_through(streams, loss, coefficient)
        return {"tokens": _number(rows)} | statistics | {"forget_loss": total}

    def layer_loss(self, stream: Tensor, layer: int, rows: Rows, batches: Batches, step: int) -> Measured:
        """One target layer's share of F for one micro-batch, [] float32, and of its uniform loss and entropy.

        Args:
            stream: [B, S, D], what translator `layer` reads; the loss is differentiable in it.
        """
        tokens, exact = batches.tokens(step), self.forget_loss == "uniform"
        with torch.set_grad_enabled(exact):
            hidden = self.lens.hidden(rows.at_real(stream), layer)
            losses, entropy = uniform_per_token(hidden, self.lens.unembedding, softcap=self.lens.softcap)
        mean = losses.sum() / tokens
        loss = mean if exact else self._against_tokens(stream, layer, rows, batches, step)
        statistics = {f"uniform_loss/{layer}": mean.detach(), f"entropy/{layer}": entropy.sum() / tokens}
        return loss / len(self.layers), statistics

    def _against_tokens(self, stream: Tensor, layer: int, rows: Rows, batches: Batches, step: int) -> Tensor:
        """This micro-batch's share of the cross-entropy against sampled tokens, or minus that of the true ones."""
        vocabulary = self.lens.unembedding.shape[0]
        scale = 1.0 / math.log(vocabulary)
        if self.forget_loss == "sampled":
            draws = random_bits(rows.keys ^ layer, rows.input_ids.shape[1])[:, :, 0] % vocabulary
            hidden, targets = self.lens.hidden(rows.at_real(stream), layer), rows.at_real(draws).long()
            scale /= batches.tokens(step)
        else:
            hidden = self.lens.hidden(rows.at_leading(stream), layer)
            targets = rows.next_ids()
            scale /= -batches.targets(step)
        weights = torch.full(targets.shape, scale, device=hidden.device)
        return next_token(hidden, self.lens.unembedding, targets, weights, softcap=self.lens.softcap)[0]

    def _retain_kl(self, tokens: int, rows: Rows, coefficient: float) -> Tensor:
        """Backward of `coefficient` times this micro-batch's share of R, the mean divergence from the original over
        the `tokens` of the global batch; that share, [] float32."""
        final = int(self.model.config.num_hidden_layers)
        with torch.no_grad(), self.autocast(), self.reference() as original:
            kept = final_norm(original)(rows.at_real(residual_streams(original, rows.input_ids, [final])[final]))
        set_dropout_rows(self.model, rows.keys)
        with torch.set_grad_enabled(coefficient > 0.0), self.autocast():
            hidden = final_norm(self.model)(rows.at_real(residual_streams(self.model, rows.input_ids, [final])[final]))
            total = self._divergence(hidden, original, kept, tokens)
        if coefficient > 0.0:
            (coefficient * total).backward()
        else:
            reshard(self.model)
        reshard(original)
        return total.detach()

    def _retain_l2(self, tokens: int, rows: Rows, coefficient: float) -> Tensor:
        """The same for R as the mean distance of the residual streams at the target layers."""
        layers = [layer + self._shift for layer in self.layers]
        with torch.no_grad(), self.autocast(), self.reference() as original:
            kept = residual_streams(original, rows.input_ids, layers)
        reshard(original)
        set_dropout_rows(self.model, rows.keys)
        with torch.set_grad_enabled(coefficient > 0.0), self.autocast():
            streams = residual_streams(self.model, rows.input_ids, layers)

        def loss(layer: int, stream: Tensor) -> Measured:
            distances = l2_distance(rows.at_real(stream), rows.at_real(kept.pop(layer)))
            return distances.sum() / (tokens * len(layers)), {}

        total, _ = backward_through(streams, loss, coefficient)
        if coefficient == 0.0:
            reshard(self.model)
        return total

    def _divergence(self, hidden: Tensor, original: PreTrainedModel, kept_hidden: Tensor, tokens: int) -> Tensor:
        """Sum of KL(original || model) over some tokens' normalised hidden states [N, D], over `tokens`."""
        weights = torch.full(hidden.shape[:1], 1.0 / tokens, device=hidden.device)
        cap, training = softcap(self.model), torch.is_grad_enabled()

        def divergence(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            return kl_divergence(live, matrix, kept, kept_matrix, weights, softcap=cap)[0]

        if original is self.model:  # adapters leave the unembedding as it was
            return through_head(self.model, hidden, lambda live, matrix: divergence(live, matrix, kept_hidden, matrix))

        def beside(kept: Tensor, kept_matrix: Tensor) -> Tensor:
            with torch.set_grad_enabled(training):
                return through_head(
                    self.model, hidden, lambda live, matrix: divergence(live, matrix, kept, kept_matrix)
                )

        with torch.no_grad():
            return through_head(original, kept_hidden, beside)


def backward_through(
    streams: Mapping[int, Tensor], loss: Callable[[int, Tensor], Measured], coefficient: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward of `coefficient` times the sum over l of loss(l, h[l]).

    A stream's own loss is computed when the gradient from the blocks above arrives there, and its gradient is added.

    Args:
        streams: {l: h[l]} of one forward pass, from the lowest l on. loss: its value, differentiable in h[l] and
            through nothing else that is trained, and what to log.

    Returns:
        The sum of losses, [] float32, and of what to log.
    """
    measured: dict[int, Measured] = {}

    def measure(layer: int, stream: Tensor) -> Tensor | None:
        """The gradient of one stream's own loss."""
        with torch.set_grad_enabled(coefficient > 0.0 and stream.requires_grad):
            share, statistics = loss(layer, stream)
        measured[layer] = share.detach(), statistics
        return torch.autograd.grad(coefficient * share, stream)[0] if share.requires_grad else None

    trained = [layer for layer in streams if coefficient > 0.0 and streams[layer].requires_grad]
    for layer in trained[:-1]:
        leaf = streams[layer].detach().requires_grad_()
        streams[layer].register_hook(partial(_joined, partial(measure, layer, leaf)))
    if trained:
        top = streams[trained[-1]]
        top.backward(measure(trained[-1], top.detach().requires_grad_()))
    for layer in streams.keys() - measured.keys():  # h[0] has no gradient where embeddings are frozen
        measure(layer, streams[layer].detach())
    total, logged = torch.zeros((), device=next(iter(streams.values())).device), dict[str, Tensor]()
    for layer in sorted(measured):
        total = total + measured[layer][0]
        _add(logged, measured[layer][1])
    return total, logged


def _joined(own: Callable[[], Tensor | None], above: Tensor) -> Tensor | None:
    """The gradient of a stream: what the blocks `above` contribute, and its own loss."""
    with torch.enable_grad():
        gradient = own()
    return above if gradient is None else above + gradient


def _number(rows: Rows) -> Tensor:
    return torch.full((), rows.tokens, device=rows.input_ids.device)


def _add(metrics: dict[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
    for key, value in statistics.items():
        metrics[key] = metrics[key] + value if key in metrics else value


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A `Reference` of LoRA training: the model itself, with its adapters switched off."""
    with lora_disabled(model):
        yield model
