"""Tuned-lens unlearning: what a frozen lens reads off the target layers is pushed towards uniform.

    F = mean over target layers and tokens of (logsumexp z[l] - mean z[l]) / ln V,  loss = remove(s) F + retain(s) R
    remove(s) = remove_coef (1 - 0.25 s),  retain(s) = retain_coef (start + (1 - start) s)

R is KL(original || model) in nats, or the L2 distance of the residual streams at the target layers.

Shapes: B rows, S positions, N real tokens among them, D hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor

from unlearn.config import TrainConfig
from unlearn.data import Rows
from unlearn.losses import next_token, uniform_per_token
from unlearn.methods.retain import by_prediction, by_streams
from unlearn.methods.terms import Cost, Numbers, OnStreams, Parts, Term, falling, rising
from unlearn.model import residual_streams
from unlearn.seeding import random_bits


def terms(flags: TrainConfig, parts: Parts) -> list[Term]:
    """The forget term and the retain term, without one whose coefficient is 0."""
    shift = 1 if flags.lens_tap == "output" else 0  # how far above h[l] translator l reads
    tapped = tuple(layer + shift for layer in flags.layers)
    found = []
    if flags.remove_coef:
        forget = ReadOff(flags, parts, shift)
        found.append(Term("forget", parts.batches["forget"], forget, falling(flags.remove_coef)))
    if flags.retain_coef:
        hold = by_prediction(parts) if flags.retain_loss == "kl" else by_streams(parts, tapped)
        found.append(Term("retain", parts.batches["retain"], hold, rising(flags.retain_coef, flags.retain_start)))
    return found


class ReadOff:
    """The forget loss of what the lens reads at each target layer l, h[l + shift] [B, S, D]."""

    def __init__(self, flags: TrainConfig, parts: Parts, shift: int):
        self.flags, self.model, self.shift, self.lens = flags, parts.model, shift, parts.lens(flags.layers)

    def __call__(self, rows: Rows) -> Cost:
        def loss(tap: int, stream: Tensor) -> tuple[Tensor, Numbers]:
            return self.layer_loss(rows, stream, tap - self.shift)

        tapped = [layer + self.shift for layer in self.flags.layers]
        return OnStreams(residual_streams(self.model, rows.input_ids, tapped), loss)

    def layer_loss(self, rows: Rows, stream: Tensor, layer: int) -> tuple[Tensor, Numbers]:
        """One target layer's share of F, [] float32, and of its uniform loss and entropy."""
        exact = self.flags.forget_loss == "uniform"
        with torch.set_grad_enabled(exact and torch.is_grad_enabled()):
            hidden = self.lens.hidden(rows.at_real(stream), layer)  # [N, D]
            losses, entropy = uniform_per_token(hidden, self.lens.unembedding, softcap=self.lens.softcap)  # [N]
        mean = rows.mean(losses)
        loss = mean if exact else self.against_tokens(rows, stream, layer)
        numbers = {f"uniform_loss/{layer}": mean.detach(), f"entropy/{layer}": rows.mean(entropy)}
        return loss / len(self.flags.layers), numbers

    def against_tokens(self, rows: Rows, stream: Tensor, layer: int) -> Tensor:
        """Cross-entropy against tokens drawn uniformly, or minus that of the true ones, over ln V; [] float32."""
        vocabulary = self.lens.unembedding.shape[0]
        if self.flags.forget_loss == "sampled":
            draws = random_bits(rows.keys ^ layer, rows.input_ids.shape[1])[:, :, 0] % vocabulary  # [B, S]
            hidden, targets, weights = rows.at_real(stream), rows.at_real(draws).long(), rows.weights()
        else:
            hidden, targets, weights = rows.at_leading(stream), rows.next_ids(), -rows.leading_weights()
        read = self.lens.hidden(hidden, layer)
        total, _ = next_token(read, self.lens.unembedding, targets, weights, softcap=self.lens.softcap)
        return total / math.log(vocabulary)
