"""Holding a model to its original on retain text, for every method: by its predictions or by its residual streams.

Shapes: N real tokens of a micro-batch, D hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unlearn.data import Rows
from unlearn.losses import kl_divergence, l2_distance
from unlearn.methods.terms import Cost, Numbers, OnStreams, Parts, Plain
from unlearn.model import final_hidden, residual_streams, softcap, through_head


def by_prediction(parts: Parts) -> Callable[[Rows], Cost]:
    """Mean KL(original || model) a token, in nats."""
    model, cap = parts.model, softcap(parts.model)

    def cost(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = final_hidden(original, rows.input_ids, rows.at_real)  # [N, D]
        hidden, training = final_hidden(model, rows.input_ids, rows.at_real), torch.is_grad_enabled()

        def divergence(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            return kl_divergence(live, matrix, kept, kept_matrix, rows.weights(), softcap=cap)[0]

        if original is model:  # adapters leave the unembedding as it was
            return Plain(through_head(model, hidden, lambda live, matrix: divergence(live, matrix, kept, matrix)))

        def beside(kept: Tensor, kept_matrix: Tensor) -> Tensor:
            with torch.set_grad_enabled(training):
                return through_head(model, hidden, lambda live, matrix: divergence(live, matrix, kept, kept_matrix))

        with torch.no_grad():
            return Plain(through_head(original, kept, beside))

    return cost


def by_streams(parts: Parts, layers: tuple[int, ...]) -> Callable[[Rows], Cost]:
    """Mean distance of the residual streams at `layers`."""

    def cost(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = residual_streams(original, rows.input_ids, layers)

        def distance(layer: int, stream: Tensor) -> tuple[Tensor, Numbers]:
            distances = l2_distance(rows.at_real(stream), rows.at_real(kept.pop(layer)))  # [N]
            return rows.mean(distances) / len(layers), {}

        return OnStreams(residual_streams(parts.model, rows.input_ids, layers), distance)

    return cost
