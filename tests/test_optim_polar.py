"""The floored orthogonal factor against the singular value decomposition, and what rounding does to it."""

import math

import pytest
import torch
from torch import Tensor

from unlearn.optim.newton_schulz import POLAR_EXPRESS, SAFETY
from unlearn.optim.polar import CUSHION, EXACT_SIDE, FLOOR, _best_quintic, flops, polar_factor, polynomials, wire_dtype

SMALL = [(512, 16), (16, 512), (64, 64), (5, 7), (1, 9), (9, 1)]
LARGE = [(256, 256), (512, 2048), (2048, 512)]
KINDS = ("full rank", "rank 3", "geometric", "zero")
# The iteration's dtype on a CPU, on a GPU, and the coarsest. The bound on what a perturbation of 1e-7 changes: bfloat16
# on the way (2^-9 a rounding, of which it flips a few) and the iteration's roundings, some of which it flips.
DTYPES = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def gradient(kind: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """[m, n]: of full rank; of rank 3; with singular values from 1 to 1e-4, evenly in their logarithm; or zero."""
    generator = torch.Generator().manual_seed(seed)
    (m, n), short = shape, min(shape)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "full rank":
        return torch.randn(shape, generator=generator)
    if kind == "rank 3":
        return torch.randn(m, 3, generator=generator) @ torch.randn(3, n, generator=generator)
    u, v = (torch.linalg.qr(torch.randn(k, short, generator=generator, dtype=torch.float64))[0] for k in (m, n))
    return (u * torch.logspace(0, -4, short, dtype=torch.float64) @ v.T).float()


def perturbed(matrix: Tensor) -> Tensor:
    """By 1e-7 of each element, as another order of float32 sums would."""
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (matrix.double() * (1.0 + 1e-7 * noise)).float()


def exact(matrix: Tensor, floor: float) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u * (s / (floor * s[0]).clamp(min=1e-300)).clamp(max=1.0) @ v


def sent(matrix: Tensor, floor: float) -> Tensor:
    """As it arrives at the rank that orthogonalises it."""
    return matrix.to(wire_dtype(*matrix.shape, floor))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SMALL)
def test_small_sides_are_exact(shape: tuple[int, int], kind: str) -> None:
    """Within float32 of the exact floored factor; noise grows by no more than 1 / floor."""
    matrix = gradient(kind, shape)
    for floor in (1e-3, FLOOR, 0.1):
        found, expected = polar_factor(sent(matrix, floor), floor=floor), exact(matrix, floor)
        again = polar_factor(sent(perturbed(matrix), floor), floor=floor)
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert (found - again).norm() <= 1e-3 * found.norm()


@pytest.mark.parametrize(
    ("shape", "dtype"),  # bfloat16 on the least: it is slow where there are no matrix units for it
    [(shape, dtype) for shape in LARGE for dtype in DTYPES if dtype != torch.bfloat16 or shape == LARGE[0]],
)
@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_do_not_magnify_rounding(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """A perturbation of 1e-7 stays small; of a rank-3 gradient, the 250 or 509 directions that bfloat16 adds stay below
    10 % of the norm, which is sqrt(3); without a floor they are above it."""
    matrix = gradient(kind, shape)
    for method in ("gram", "polar-express") if dtype == torch.float32 else ("gram",):
        found = polar_factor(sent(matrix, FLOOR), method, dtype=dtype).double()
        again = polar_factor(sent(perturbed(matrix), FLOOR), method, dtype=dtype).double()
        assert (found - again).norm() <= DTYPES[dtype] * found.norm()
        assert torch.linalg.matrix_norm(found, 2) < 1.06
        if kind == "rank 3":
            assert found.norm().item() == pytest.approx(math.sqrt(3.0), rel=0.1)
            assert polar_factor(sent(matrix, FLOOR), method, floor=0.0).float().norm() > 1.2 * math.sqrt(3.0)
        if kind == "full rank":
            assert (found - exact(matrix, FLOOR)).norm() < 0.02 * found.norm()


def test_the_polynomials_are_those_of_polar_express() -> None:
    """Made for [1e-3, 1] they are the published table; for [floor, 1] they bring all of it within 5 % of 1."""
    low, high = 1e-3, 1.0
    for published in POLAR_EXPRESS[:5]:
        a, b, c = _best_quintic(max(low, CUSHION * high), high)
        scale = 1.0 if low >= CUSHION * high else 2.0 / sum(a * x + b * x**3 + c * x**5 for x in (low, high))
        assert (a * scale, b * scale, c * scale) == pytest.approx(published, rel=1e-6)
        low = scale * (a * low + b * low**3 + c * low**5)
        high = 2.0 - low
    for floor in (1e-4, 1e-3, FLOOR, 0.1, 0.5, 0.999):
        x = torch.cat([torch.linspace(floor, 1.0, 10_001, dtype=torch.float64), torch.tensor([floor / 100])])
        slope = 1.0
        for a, b, c in polynomials(floor):
            x, slope = a * x + b * x**3 + c * x**5, slope * a
        assert (x[:-1] - 1.0).abs().max() < 0.06
        assert slope < 2.5 / floor and x[-1] < 0.025  # what is far below the floor stays far below 1
    assert [len(polynomials(floor)) for floor in (1e-3, FLOOR, 0.1)] == [6, 4, 3]
    assert polynomials(FLOOR, 2) == polynomials(FLOOR)[:2] and SAFETY > 1.0


@pytest.mark.parametrize("shape", [(6, 100, 300), (4, 300, 100), (3, 90, 90), (5, 16, 200)])
def test_a_batch_is_its_matrices(shape: tuple[int, int, int]) -> None:
    """Up to rounding; a matrix of zeros among them stays one, and their scales do not matter."""
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch[1] = 0.0
    batch[2] *= 1e-12
    for dtype in (torch.float32, torch.float16):
        together = polar_factor(batch, dtype=dtype)
        alone = torch.stack([polar_factor(matrix, dtype=dtype) for matrix in batch])
        assert together[1].count_nonzero() == 0 and torch.isfinite(together).all()
        assert (together - alone).norm() < 0.01 * alone.norm()
        assert alone[2].norm().item() == pytest.approx(alone[0].norm().item(), rel=0.05)


def test_float16_keeps_its_range() -> None:
    """Of one direction alone, R = X X^T is as large as it gets; of equal ones, as small."""
    for shape in ((70, 4000), (4000, 70), (128, 128)):
        one = torch.outer(torch.ones(shape[0]), torch.ones(shape[1]))
        equal = torch.eye(*shape)
        for matrix in (one, 1e-20 * one, 1e15 * equal):
            found = polar_factor(matrix, dtype=torch.float16)
            assert (found - exact(matrix, FLOOR)).norm() < 0.06 * found.norm()


def test_the_argument_is_left_alone_and_dtypes_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((16, 200), (100, 300)):
            matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            before = matrix.clone()
            assert polar_factor(matrix).dtype == dtype and torch.equal(matrix, before)
    assert wire_dtype(EXACT_SIDE, 4096, FLOOR) == wire_dtype(4096, 1, FLOOR) == torch.float32
    assert wire_dtype(65, 4096, FLOOR) == wire_dtype(16, 4096, 0.0) == torch.bfloat16


def test_flops() -> None:
    """With the floor, the whole 6.9 B model takes 0.75 of what it takes without one."""
    shapes = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
    assert flops(100, 1000) == 8 * 100**2 * 1000 + 20 * 100**3
    assert flops(100, 110, floor=0.0) == 20 * 100**2 * 110 + 10 * 100**3
    assert flops(16, 4096) == 4 * 16 * 16 * 4096 + 12 * 16**3
    assert round(sum(32 * flops(*shape) for shape in shapes) / 1e12) == 378
    assert round(sum(32 * flops(*shape, floor=0.0) for shape in shapes) / 1e12) == 501


def test_what_is_refused() -> None:
    for method, floor in (("gram", 0.2), ("gram", -0.1), ("quintic", 0.01)):
        with pytest.raises(ValueError, match="expected a floor"):
            polar_factor(torch.ones(3, 3), method, floor=floor)
