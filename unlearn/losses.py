"""Vocabulary-sized losses, a chunk of tokens at a time.

Shapes: N tokens, D hidden size, V vocabulary. Every function takes the *normalised* hidden states [N, D] of the tokens
that count (no padding) and an unembedding matrix U [V, D], and returns one float32 loss a token [N], in nats unless
said otherwise. Logits are z = U h, soft-capped as c tanh(z / c) where a model does so; they exist for one chunk only.

A chunk's logits are needed once: the loss and its gradient are computed together in the forward pass, and backward
only scales what was stored. Memory is one [chunk, V] float32 buffer, not [N, V].

Logits leave their product in float32, whatever it multiplies: rounded to bfloat16 (steps of 0.06 at a logit of 10) they
make a divergence of 6e-6 nats ten times as large, and most of its gradient is that rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # tokens; 512 x 50,304 float32 logits are 0.1 GiB
BLOCK = 1 << 20  # numbers of an unembedding that a CPU has in float32 at once


def logits_of(
    hidden: Tensor, unembedding: Tensor, softcap: float | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Float32 logits [.., V] of hidden states [.., D], without gradients.

    Args:
        out: float32 [N, V], to write the products into; `hidden` is then [N, D].
    """
    matrix = computed(unembedding)
    inputs = hidden.detach().reshape(-1, hidden.shape[-1]).to(matrix.dtype)
    if out is None:
        out = matrix.new_empty(inputs.shape[0], matrix.shape[0], dtype=torch.float32)
    _multiply(inputs, matrix, out)  # into `out`, which autocast leaves alone
    return _capped(out.view(*hidden.shape[:-1], -1), softcap)


def computed(matrix: Tensor) -> Tensor:
    """A matrix, without gradients, in the dtype in which it is multiplied: autocast's, or else its own."""
    kind = matrix.device.type
    return matrix.detach().to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else matrix.detach()


def _multiply(inputs: Tensor, matrix: Tensor, out: Tensor) -> None:
    """`inputs` [N, D] times the transpose of `matrix` [V, D], summed and left in float32, into `out` [N, V]."""
    if matrix.dtype == torch.float32:
        torch.mm(inputs, matrix.T, out=out)
    elif matrix.device.type != "cpu":
        torch.mm(inputs, matrix.T, torch.float32, out=out)  # what the GPU sums in anyway
    else:  # there a product of bfloat16 is rounded to bfloat16
        exact, rows = inputs.float(), max(1, BLOCK // matrix.shape[1])
        for start in range(0, matrix.shape[0], rows):
            torch.mm(exact, matrix[start : start + rows].float().T, out=out[:, start : start + rows])


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _Buffers:
    """Room for one chunk's logits, and for what is multiplied with the unembedding, in its dtype.

    One of each for all chunks: on a CPU, fresh memory costs as much as a pass over it.
    """

    def __init__(self, unembedding: Tensor, rows: int):
        self._logits = unembedding.new_empty(rows, unembedding.shape[0], dtype=torch.float32)
        self._rounded = self._logits if unembedding.dtype == torch.float32 else self._logits.to(unembedding.dtype)

    def logits(self, rows: int) -> Tensor:
        """Float32 [rows, V]."""
        return self._logits[:rows]

    def rounded(self, slope: Tensor) -> Tensor:
        """`slope` [rows, V] in the unembedding's dtype; overwrites what was rounded before."""
        return self._rounded[: slope.shape[0]].copy_(slope)


def _uniform_chunk(
    hidden: Tensor, unembedding: Tensor, mean_row: Tensor, buffers: _Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp - mean [n], entropy [n], gradient of the former [n, D]) of one chunk.

    Both remaining sums over V are products with U: mean_v z = h . mean_v U_v, and sum_v p_v z_v = h . (p U). The
    gradient is (p - 1/V) U, subtracted before the product: near a uniform prediction p U and mean_v U_v are nearly
    equal, and their difference would be the rounding of the product.
    """
    logits = logits_of(hidden, unembedding, out=buffers.logits(hidden.shape[0]))
    largest = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    log_normaliser = (largest + total.log()).squeeze(-1)
    slope = weights.sub_(total / weights.shape[-1])  # (p - 1/V) total
    gradient = (buffers.rounded(slope) @ unembedding).float() / total
    exact = hidden.float()
    entropy = log_normaliser - torch.linalg.vecdot(exact, gradient + mean_row)
    return log_normaliser - exact @ mean_row, entropy, gradient


def _uniform_chunk_capped(
    hidden: Tensor, unembedding: Tensor, mean_row: Tensor, buffers: _Buffers, *, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for soft-capped logits, whose mean is no product with U."""
    logits = logits_of(hidden, unembedding, softcap, out=buffers.logits(hidden.shape[0]))
    log_normaliser, probabilities = torch.logsumexp(logits, dim=-1), torch.softmax(logits, dim=-1)
    entropy = log_normaliser - torch.linalg.vecdot(probabilities, logits)
    slope = (probabilities - 1.0 / logits.shape[-1]) * (1.0 - (logits / softcap).square())
    return log_normaliser - logits.mean(dim=-1), entropy, (buffers.rounded(slope) @ unembedding).float()


class _Uniform(torch.autograd.Function):
    """Uniform cross-entropy and entropy of each token, with the gradient kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, chunk: int, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        scale = 1.0 / math.log(unembedding.shape[0])
        mean_row = unembedding.mean(dim=0, dtype=torch.float32)  # [D]
        loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy = torch.empty_like(loss)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        one_chunk = _uniform_chunk if softcap is None else partial(_uniform_chunk_capped, softcap=softcap)
        buffers = _Buffers(unembedding, min(chunk, hidden.shape[0]))
        for start in range(0, hidden.shape[0], chunk):
            tokens = hidden[start : start + chunk]
            part = slice(start, start + tokens.shape[0])
            loss[part], entropy[part], slope = one_chunk(tokens, unembedding, mean_row, buffers)
            loss[part] *= scale
            if gradient is not None:
                gradient[part] = slope * scale
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[0][:, None] * gradient).to(gradient.dtype), None, None, None


def uniform_per_token(
    hidden: Tensor, unembedding: Tensor, *, chunk: int = CHUNK, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The forget loss of each token and the entropy of its distribution.

    The loss is (logsumexp_v z - mean_v z) / ln V: the expected cross-entropy against a uniformly drawn token, over its
    floor ln V, so 1.0 means a uniform prediction. Its gradient with respect to z is (softmax(z) - 1/V) / ln V.

    Args:
        hidden: [N, D], normalised; the loss is differentiable in it.
        unembedding: [V, D], frozen.
        chunk: tokens whose logits exist at once; has no effect on the result beyond rounding.

    Returns:
        loss [N] (ratio to ln V, differentiable) and entropy [N] (nats, not differentiable), both float32.
    """
    return _Uniform.apply(hidden, unembedding.detach(), chunk, softcap)


def uniform_cross_entropy(
    hidden: Tensor, unembedding: Tensor, *, chunk: int = CHUNK, softcap: float | None = None
) -> Tensor:
    """Mean over tokens of (logsumexp_v z - mean_v z) / ln V, float32 []; differentiable in `hidden` [.., D].

    Raises:
        ValueError: there is no token to take a mean over.
    """
    if hidden.numel() == 0:
        raise ValueError(f"expected at least one token; found hidden states of shape {tuple(hidden.shape)}")
    flat = hidden.reshape(-1, hidden.shape[-1])
    return uniform_per_token(flat, unembedding, chunk=chunk, softcap=softcap)[0].mean()


ChunkLoss = Callable[[Tensor, slice], Tensor]  # (float32 logits [n, V], which tokens) -> loss [n]


def _one_chunk(
    hidden: Tensor,
    matrix: Tensor,
    weights: Tensor,
    chunk_loss: ChunkLoss,
    part: slice,
    softcap: float | None,
    hidden_gradient: Tensor | None,
    matrix_gradient: Tensor | None,
) -> Tensor:
    """The losses [n] of one chunk, the tokens `part` of all.

    Its gradients are written to the first, and added to the second, where they are wanted. The logits are gone before
    the next chunk's are made.
    """
    logits = logits_of(hidden, matrix)
    wanted = hidden_gradient is not None or matrix_gradient is not None
    with torch.enable_grad():
        losses = chunk_loss(_capped(logits.requires_grad_(wanted), softcap), part)
    if wanted:
        slope = torch.autograd.grad(losses, logits, grad_outputs=weights)[0].to(matrix.dtype)
        if hidden_gradient is not None:
            hidden_gradient.copy_(slope @ matrix)
        if matrix_gradient is not None:
            matrix_gradient.add_(slope.T @ hidden.to(matrix.dtype))
    return losses.detach()


class _Chunked(torch.autograd.Function):
    """Any per-token loss of the logits, chunk by chunk, differentiable in the hidden states and the unembedding."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        weights: Tensor,
        chunk_loss: ChunkLoss,
        chunk: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        loss = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        matrix_gradient = torch.zeros_like(unembedding, dtype=torch.float32) if unembedding.requires_grad else None
        matrix = computed(unembedding)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            gradient = None if hidden_gradient is None else hidden_gradient[part]
            loss[part] = _one_chunk(
                hidden[part], matrix, weights[part], chunk_loss, part, softcap, gradient, matrix_gradient
            )
        ctx.save_for_backward(hidden_gradient, matrix_gradient)
        ctx.matrix_dtype = unembedding.dtype
        ctx.mark_non_differentiable(loss)
        return torch.dot(loss, weights), loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, matrix_gradient = ctx.saved_tensors
        scale = upstream[0]
        return (
            None if hidden_gradient is None else (scale * hidden_gradient).to(hidden_gradient.dtype),
            None if matrix_gradient is None else (scale * matrix_gradient).to(ctx.matrix_dtype),
            None,
            None,
            None,
            None,
        )


def chunked(
    hidden: Tensor, unembedding: Tensor, weights: Tensor, chunk_loss: ChunkLoss, chunk: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Any loss of a token's logits: the weighted sum [] (differentiable) and the loss of each token [N], float32.

    Args:
        hidden, unembedding: [N, D] and [V, D]; differentiable in both.
        weights: [N], what each token counts for in the sum.
        chunk_loss: of some tokens' logits, and differentiable in them.
    """
    return _Chunked.apply(hidden, unembedding, weights.float(), chunk_loss, chunk, softcap)


def next_token(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against given tokens.

    Args:
        hidden: [N, D], normalised. unembedding: [V, D]. Differentiable in both.
        targets: int64 [N]. weights: [N], what each token counts for in the sum.

    Returns:
        the weighted sum [] (differentiable) and the loss of each token [N] in nats (not differentiable), float32.
    """

    def chunk_loss(logits: Tensor, part: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")

    return chunked(hidden, unembedding, weights, chunk_loss, chunk, softcap)


Target = Callable[[slice], Tensor]  # which tokens -> unnormalised log-probabilities [n, V] of a target, float32


def divergence(
    hidden: Tensor,
    unembedding: Tensor,
    target: Target,
    weights: Tensor,
    *,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each token, where q is the softmax of a target.

    The gradient of the logits is p - q, subtracted as it stands: exactly zero where both agree. By log-softmax it would
    be p sum(q) - q, which leaves rounding to train on.

    Args:
        hidden, unembedding: [N, D] and [V, D]; differentiable in both.
        weights: [N], what each token counts for in the sum.

    Returns:
        the weighted sum [] (differentiable) and the divergence of each token [N] in nats, both float32.
    """

    def chunk_loss(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            reference = torch.log_softmax(target(part), dim=-1)
            live = torch.log_softmax(logits, dim=-1)
            expected = reference.exp()
            found = (expected * reference.sub_(live)).sum(dim=-1)
            slope = live.exp_().sub_(expected)
        moved = (slope * logits).sum(dim=-1)
        return found + (moved - moved.detach())

    return chunked(hidden, unembedding, weights, chunk_loss, chunk, softcap)


def logits_target(hidden: Tensor, unembedding: Tensor, softcap: float | None = None) -> Target:
    """The logits of a frozen model, from its hidden states [N, D] and unembedding [V, D]."""
    matrix = computed(unembedding)
    return lambda part: logits_of(hidden[part], matrix, softcap)


def kl_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    reference_hidden: Tensor,
    reference_unembedding: Tensor,
    weights: Tensor,
    *,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(p_ref || p) of each token, where p_ref is that of a frozen original: [N, D], [V, D]; see `divergence`."""
    target = logits_target(reference_hidden, reference_unembedding, softcap)
    return divergence(hidden, unembedding, target, weights, chunk=chunk, softcap=softcap)


def l2_distance(hidden: Tensor, reference: Tensor) -> Tensor:
    """||h - h_ref||_2 of each token, float32 [N], of residual streams [N, D]; the gradient at distance 0 is 0."""
    return torch.linalg.vector_norm(hidden.float() - reference.float(), dim=-1)
