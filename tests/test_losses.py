"""Chunked losses against their naive float64 forms."""

import math

import pytest
import torch
from torch import Tensor

from unlearn.losses import (
    _multiply,
    kl_divergence,
    l2_distance,
    logits_of,
    next_token,
    uniform_cross_entropy,
    uniform_per_token,
)

# float32 sums over a 301-word vocabulary of logits of size about 5
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def naive_logits(hidden: Tensor, matrix: Tensor, softcap: float | None) -> Tensor:
    logits = hidden.double() @ matrix.double().T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def inputs(tokens: int, width: int = 24, vocabulary: int = 301) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator)
    return hidden, torch.randn(vocabulary, width, generator=generator)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_uniform_cross_entropy(tokens: int, chunk: int, softcap: float | None) -> None:
    hidden, matrix = inputs(tokens)
    naive = hidden.double().requires_grad_()
    logits = naive_logits(naive, matrix, softcap)
    expected = -torch.log_softmax(logits, -1).mean() / math.log(301)
    expected.backward()
    hidden.requires_grad_()
    loss = uniform_cross_entropy(hidden, matrix, chunk=chunk, softcap=softcap)
    loss.backward()
    torch.testing.assert_close(loss, expected.float(), **TOLERANCE)
    torch.testing.assert_close(hidden.grad, naive.grad.float(), **TOLERANCE)


def test_uniform_cross_entropy_takes_any_shape_and_upstream_gradient() -> None:
    hidden, matrix = inputs(12)
    flat = hidden.clone().requires_grad_()
    shaped = hidden.reshape(3, 4, -1).clone().requires_grad_()
    (5 * uniform_cross_entropy(flat, matrix)).backward()
    (5 * uniform_cross_entropy(shaped, matrix, chunk=5)).backward()
    torch.testing.assert_close(shaped.grad.reshape(12, -1), flat.grad)


def test_floor_is_one_and_entropy_is_exact() -> None:
    hidden, matrix = inputs(9)
    loss, entropy = uniform_per_token(torch.zeros_like(hidden), matrix)
    torch.testing.assert_close(loss, torch.ones(9))
    torch.testing.assert_close(entropy, torch.full((9,), math.log(301)))
    _, entropy = uniform_per_token(hidden, matrix, chunk=4)
    expected = torch.distributions.Categorical(logits=naive_logits(hidden, matrix, None)).entropy()
    # a sum over the vocabulary, in float32 and in whatever order the processor's vectors have it
    rounding = 301 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(entropy, expected.float(), rtol=rounding, atol=rounding)


def test_no_token_is_an_error() -> None:
    hidden, matrix = inputs(3)
    with pytest.raises(ValueError, match="at least one token"):
        uniform_cross_entropy(hidden[:0], matrix)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_next_token_and_its_gradients(chunk: int, softcap: float | None) -> None:
    hidden, matrix = (tensor.requires_grad_() for tensor in inputs(11))
    targets = torch.randint(301, (11,), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1))
    loss, per_token = next_token(hidden, matrix, targets, weights, chunk=chunk, softcap=softcap)
    (2 * loss).backward()
    naive_hidden, naive_matrix = (tensor.detach().double().requires_grad_() for tensor in (hidden, matrix))
    logits = naive_logits(naive_hidden, naive_matrix, softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (2 * (expected * weights).sum()).backward()
    torch.testing.assert_close(per_token, expected.float(), **TOLERANCE)
    torch.testing.assert_close(hidden.grad, naive_hidden.grad.float(), **TOLERANCE)
    torch.testing.assert_close(matrix.grad, naive_matrix.grad.float(), **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_kl_divergence_and_its_gradients(chunk: int) -> None:
    hidden, matrix = (tensor.requires_grad_() for tensor in inputs(11))
    reference_hidden, reference_matrix = inputs(12)
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1))
    loss, per_token = kl_divergence(hidden, matrix, reference_hidden[:11], reference_matrix, weights, chunk=chunk)
    loss.backward()
    naive_hidden, naive_matrix = (tensor.detach().double().requires_grad_() for tensor in (hidden, matrix))
    live = torch.log_softmax(naive_logits(naive_hidden, naive_matrix, None), -1)
    kept = torch.log_softmax(naive_logits(reference_hidden[:11], reference_matrix, None), -1)
    expected = torch.nn.functional.kl_div(live, kept, log_target=True, reduction="none").sum(-1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(per_token, expected.float(), **TOLERANCE)
    torch.testing.assert_close(hidden.grad, naive_hidden.grad.float(), **TOLERANCE)
    torch.testing.assert_close(matrix.grad, naive_matrix.grad.float(), **TOLERANCE)


def test_kl_divergence_of_a_model_with_itself_is_zero_in_bf16_too() -> None:
    """The predecessor's KL, taken in bfloat16, went negative."""
    hidden, matrix = (tensor.bfloat16() for tensor in inputs(11))
    _, per_token = kl_divergence(hidden, matrix, hidden, matrix, torch.ones(11))
    assert torch.equal(per_token, torch.zeros(11))


def language_model(move: float) -> tuple[Tensor, Tensor, Tensor]:
    """Live and reference hidden states [64, D] and an unembedding [V, D], bf16: a likeliest token stands out."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2048, 256, generator=generator) * 0.12
    chosen = torch.randint(2048, (64,), generator=generator)
    hidden = torch.randn(64, 256, generator=generator) + 0.32 * matrix[chosen] / 0.12
    live = hidden + move * torch.randn(64, 256, generator=generator)
    return live.bfloat16(), hidden.bfloat16(), matrix.bfloat16()


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_no_gradient(dtype: torch.dtype) -> None:
    """It was rounding, about 1e-7 of the probabilities, which Muon made a full-size update of."""
    generator = torch.Generator().manual_seed(0)
    hidden, matrix = torch.randn(9, 16, generator=generator), torch.randn(301, 16, generator=generator)
    live, live_matrix = (value.to(dtype).requires_grad_() for value in (hidden, matrix))
    total, each = kl_divergence(live, live_matrix, hidden.to(dtype), matrix.to(dtype), torch.full((9,), 1 / 9))
    total.backward()
    assert total.item() == 0.0 and each.count_nonzero() == 0
    assert live.grad.count_nonzero() == 0 and live_matrix.grad.count_nonzero() == 0


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("move", [1e-3, 1e-2])
def test_a_small_divergence_in_bf16(move: float, autocast: bool, softcap: float | None) -> None:
    """Logits were rounded to bf16 before the softmax: ten times the divergence at 6e-6 nats, a gradient of rounding."""
    live, kept, matrix = language_model(move)
    weights = torch.full((64,), 1 / 64)
    exact, exact_matrix = live.double().requires_grad_(), matrix.double().requires_grad_()
    reference = torch.log_softmax(naive_logits(kept, matrix, softcap), -1)
    found = torch.log_softmax(naive_logits(exact, exact_matrix, softcap), -1)
    expected = (reference.exp() * (reference - found)).sum(-1).mean()
    expected.backward()
    if autocast:  # as in full training on one rank: float32 weights, multiplied in bf16
        live, kept, matrix = live.float(), kept.float(), matrix.float()
    live.requires_grad_()
    matrix.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = kl_divergence(live, matrix, kept, matrix.detach(), weights, chunk=48, softcap=softcap)
    loss.backward()
    assert 1e-6 < expected.item() < 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)
    assert cosine(live.grad, exact.grad) > 0.999 and cosine(matrix.grad, exact_matrix.grad) > 0.999


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_leave_a_product_of_bf16_in_float32(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of bf16 is 0.06 at a logit of 10; the cross-entropies read from them carried that."""
    hidden, _, matrix = language_model(0.0)
    monkeypatch.setattr("unlearn.losses.BLOCK", 256 * 301)  # several blocks, the last one short
    exact = naive_logits(hidden, matrix, softcap)
    found = logits_of(hidden.reshape(8, 8, -1), matrix, softcap)
    assert found.dtype == torch.float32 and found.shape == (8, 8, 2048)
    torch.testing.assert_close(found.flatten(0, 1), exact.float(), rtol=1e-5, atol=1e-5)
    targets = torch.arange(64)
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none").float()
    _, losses = next_token(hidden, matrix, targets, torch.ones(64), softcap=softcap)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    ratio, entropy = uniform_per_token(hidden, matrix, chunk=48, softcap=softcap)
    torch.testing.assert_close(
        ratio, (-torch.log_softmax(exact, -1).mean(-1) / math.log(2048)).float(), rtol=1e-5, atol=0
    )
    expected = torch.distributions.Categorical(logits=exact).entropy().float()
    torch.testing.assert_close(entropy, expected, rtol=0, atol=0.03)  # its second product is in bf16


def test_a_device_that_multiplies_bf16_into_float32_is_asked_to() -> None:
    hidden, _, matrix = (tensor.to("meta") for tensor in language_model(0.0))
    _multiply(hidden, matrix, torch.empty(64, 2048, device="meta"))


def test_l2_distance_has_a_finite_gradient_at_zero() -> None:
    hidden, _ = inputs(5)
    live = hidden.clone().requires_grad_()
    l2_distance(live, hidden).sum().backward()
    assert torch.equal(live.grad, torch.zeros_like(hidden))
    torch.testing.assert_close(l2_distance(hidden + 1, hidden), torch.full((5,), math.sqrt(24)))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_uniform_gradient_near_the_floor_in_bf16(softcap: float | None) -> None:
    """Where the prediction is nearly uniform the gradient is a small difference, also if tokens share a direction."""
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(1031, 64, generator=generator) + 2.0).bfloat16()
    hidden = (0.01 * torch.randn(40, 64, generator=generator)).bfloat16().requires_grad_()
    uniform_cross_entropy(hidden, matrix, softcap=softcap).backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ matrix.double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    (-torch.log_softmax(logits, dim=-1).mean() / math.log(1031)).backward()
    assert hidden.grad is not None and exact.grad is not None
    assert (hidden.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()
