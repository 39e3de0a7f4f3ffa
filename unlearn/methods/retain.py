"""Holding a model to its original on retain text, for every method: by its predictions or by its residual streams.

Shapes: N real tokens of a micro-batch, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.batches import Rows
from unlearn.config import RetainFlags
from unlearn.losses import kl_divergence, l2_distance, next_token
from unlearn.methods.terms import Cost, Hooks, Needs, Numbers, OnStreams, Parts, Plain, Term, rising
from unlearn.model import Read, final_hidden, residual_streams, softcap, through_head


def hold(flags: RetainFlags, parts: Parts, layers: tuple[int, ...]) -> list[Term]:
    """The retain term that the flags ask for, none with a coefficient of 0.

    Args:
        layers: whose residual streams `l2` and `mse` hold.
    """
    if not flags.retain_coef:
        return []
    streams = Needs(deepest=max(layers, default=None), original=True, kept=len(layers))
    cost, needs = {
        "kl": (by_prediction(parts), Needs(original=True)),
        "l2": (by_streams(parts, layers, l2_distance), streams),
        "mse": (by_streams(parts, layers, mean_square), streams),
        "next-token": (prediction(parts.model), Needs()),
    }[flags.retain_loss or "kl"]
    weight, hooks = rising(flags.retain_coef, flags.retain_start), Hooks()
    if flags.retain_budget is not None and flags.retain_rate is not None:
        dual = Dual(flags.retain_coef, flags.retain_budget, flags.retain_rate)
        weight, hooks = dual.weight, Hooks(stop=dual.follow, state=dual.state)
    return [Term("retain", parts.batches["retain"], cost, weight, needs, hooks)]


class Dual:
    """The weight of a retain loss that is to stay within a budget: w <- max(0, w + rate (R - budget)) after each step.

    Dual ascent on min F subject to R <= budget (Entesari et al. 2025, https://arxiv.org/abs/2506.05314). A weight of 0
    is held just above it, so that every step costs the same.
    """

    def __init__(self, start: float, budget: float, rate: float):
        self._weight, self._budget, self._rate = torch.tensor(start, dtype=torch.float64), budget, rate

    def weight(self, s: float) -> float:
        """That of the next step."""
        return self._weight.item()

    def follow(self, done: int, numbers: Mapping[str, float]) -> None:
        """Called with the numbers of each step, see `Hooks.stop`."""
        self._weight.add_(self._rate * (numbers["retain_loss"] - self._budget)).clamp_(min=1e-12)

    def state(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return {"weight": self._weight}


def mean_square(hidden: Tensor, reference: Tensor) -> Tensor:
    """Mean over D of (h - h_ref)^2, float32 [N], of residual streams [N, D]."""
    return (hidden.float() - reference.float()).square().mean(dim=-1)


def prediction(model: PreTrainedModel) -> Callable[[Rows], Cost]:
    """Mean cross-entropy of the next token, in nats, over every token that has one."""

    def cost(rows: Rows) -> Cost:
        hidden = final_hidden(model, rows.input_ids, rows.at_leading)  # [M, D]
        targets, weights = rows.next_ids(), rows.leading_weights()
        read = partial(next_token, targets=targets, weights=weights, softcap=softcap(model))
        return Plain(through_head(model, hidden, read)[0])

    return cost


def by_prediction(parts: Parts) -> Callable[[Rows], Cost]:
    """Mean KL(original || model) a token, in nats."""
    model, cap = parts.model, softcap(parts.model)

    def cost(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = final_hidden(original, rows.input_ids, rows.at_real)  # [N, D]
        hidden = final_hidden(model, rows.input_ids, rows.at_real)

        def read(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            return kl_divergence(live, matrix, kept, kept_matrix, rows.weights(), softcap=cap)[0]

        return Plain(through_both_heads(model, hidden, original, kept, read))

    return cost


Both = Callable[[Tensor, Tensor, Tensor, Tensor], Read]


def through_both_heads(
    model: PreTrainedModel, hidden: Tensor, original: PreTrainedModel, kept: Tensor, read: Both[Read]
) -> Read:
    """`read(hidden, U, kept, U_original)` where both unembeddings are whole, differentiable in the first two.

    Args:
        hidden: [.., D] of the model. kept: [.., D] of the original, which may be the model without its adapters: they
            leave the unembedding as it was.
    """
    if original is model:
        return through_head(model, hidden, lambda live, matrix: read(live, matrix, kept, matrix))
    training = torch.is_grad_enabled()

    def beside(kept: Tensor, kept_matrix: Tensor) -> Read:
        with torch.set_grad_enabled(training):
            return through_head(model, hidden, lambda live, matrix: read(live, matrix, kept, kept_matrix))

    with torch.no_grad():
        return through_head(original, kept, beside)


def by_streams(
    parts: Parts, layers: tuple[int, ...], distance_of: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Rows], Cost]:
    """Mean distance of the residual streams at `layers`: of two [N, D], [N]."""

    def cost(rows: Rows) -> Cost:
        with torch.no_grad(), parts.original() as original:
            kept = residual_streams(original, rows.input_ids, layers)

        def distance(layer: int, stream: Tensor) -> tuple[Tensor, Numbers]:
            distances = distance_of(rows.at_real(stream), rows.at_real(kept.pop(layer)))  # [N]
            return rows.mean(distances) / len(layers), {}

        return OnStreams(residual_streams(parts.model, rows.input_ids, layers), distance)

    return cost
