"""Losses of a token's predicted distribution, for the methods that push on the output; see `losses.py` for the ways.

Shapes: M tokens that have a next one, D hidden size, V vocabulary. Every function takes normalised hidden states [M, D]
and an unembedding U [V, D], differentiable in both, and weights [M], what each token counts for in the sum. It returns
the weighted sum [] (differentiable) and the loss of each token [M] (not differentiable), float32, nats. Logits [V]
exist for one chunk of tokens at a time.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from unlearn.batches import Rows
from unlearn.losses import CHUNK, Target, chunked, next_token


def weighted_ascent(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    power: float,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-p(y)^power NLL(y), the power held constant (WGA, https://arxiv.org/abs/2502.19301)."""

    def loss(logits: Tensor, part: slice) -> Tensor:
        losses = cross_entropy(logits, targets[part], reduction="none")
        return -(-power * losses.detach()).exp() * losses

    return chunked(hidden, unembedding, weights, loss, chunk, softcap)


def entropy_gap(
    hidden: Tensor,
    unembedding: Tensor,
    weights: Tensor,
    *,
    from_uniform: bool,
    top: int | None = None,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of the prediction p from the uniform distribution u: over all tokens, or over the `top` likeliest,
    among which p is then normalised.

    Args:
        from_uniform: KL(u || p) = logsumexp z - mean z - ln V; otherwise KL(p || u) = ln V - entropy(p).
    """

    def loss(logits: Tensor, part: slice) -> Tensor:
        if top is not None:
            logits = logits.topk(top, dim=-1).values
        log_p = logits.log_softmax(dim=-1)
        if from_uniform:
            return -log_p.mean(dim=-1) - math.log(logits.shape[-1])
        return (log_p.exp() * log_p).sum(dim=-1) + math.log(logits.shape[-1])

    return chunked(hidden, unembedding, weights, loss, chunk, softcap)


def lowered(target: Target, tokens: Tensor, by: float) -> Target:
    """UNDIAL's target (https://arxiv.org/abs/2402.10052): another one, with the true token's logit lower by `by`."""

    def chunk(part: slice) -> Tensor:
        logits = target(part)
        logits[torch.arange(logits.shape[0], device=logits.device), tokens[part]] -= by
        return logits

    return chunk


def contrasted(plain: Target, novice: Target, expert: Target, strength: float) -> Target:
    """ELM's target (https://arxiv.org/abs/2410.02760): log p + strength (log p_novice - log p_expert)."""

    def chunk(part: slice) -> Tensor:
        apart = novice(part).log_softmax(dim=-1) - expert(part).log_softmax(dim=-1)
        return plain(part).log_softmax(dim=-1) + strength * apart

    return chunk


def preference(margins: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(beta margin) of each sequence (NPO, https://arxiv.org/abs/2404.05868, equation 3)."""
    return -2.0 / beta * logsigmoid(beta * margins)


@torch.no_grad()
def sequence_losses(hidden: Tensor, unembedding: Tensor, rows: Rows, softcap: float | None = None) -> Tensor:
    """Next-token losses summed over each sequence, float32 [B]; of hidden states [M, D] at `rows.leading`."""
    targets, weights = rows.next_ids(), torch.ones(rows.leading.shape, device=hidden.device)
    losses = next_token(hidden.detach(), unembedding.detach(), targets, weights, softcap=softcap)[1]
    return rows.of_sequence(losses)


def sequence_loss(
    hidden: Tensor,
    unembedding: Tensor,
    rows: Rows,
    loss: Callable[[Tensor], Tensor],
    *,
    softcap: float | None = None,
) -> Tensor:
    """This micro-batch's share, [] float32, of the mean over the global batch's sequences of a loss of each one's NLL.

    Two passes over the vocabulary: the first for the sums, whose slopes weigh the tokens in the second.

    Args:
        hidden, unembedding: [M, D] at `rows.leading`, and [V, D]; differentiable in both.
        loss: of next-token losses summed over each sequence, float32 [B] -> [B]; or fewer, of pairs, the first of which
            is the sequence that counts.
    """
    summed = sequence_losses(hidden, unembedding, rows, softcap).requires_grad_()
    with torch.enable_grad():
        losses = loss(summed)
        there = (rows.lengths()[: len(losses)] > 0).float()  # a row of padding alone is no sequence
        share = (there * losses).sum() / rows.global_sequences
    slopes = torch.autograd.grad(share, summed)[0]
    weights = slopes[rows.leading_row_of()]
    moved, _ = next_token(hidden, unembedding, rows.next_ids(), weights, softcap=softcap)
    return share.detach() + (moved - moved.detach())
