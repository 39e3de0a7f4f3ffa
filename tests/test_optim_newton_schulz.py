"""Newton-Schulz iterations against torch's own and against the singular value decomposition."""

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from unlearn.optim.newton_schulz import QUINTIC, coefficients, flops, gram_part, orthogonalize, segments

METHODS = ("quintic", "polar-express", "gram")
SIZE = 96
# odd, tall, wide, one row, one column, and sizes at which the product kernel of a transposed view differs
SHAPES = [(5, 7), (7, 5), (1, 9), (9, 1), (64, 64), (300, 100), (100, 300), (131, 67), (1333, 411)]


def spectra() -> dict[str, Tensor]:
    """Eight sets of singular values whose smallest is at least 1/100 of the greatest."""
    ramp, ones = torch.linspace(1.0, 0.0, SIZE), torch.ones(SIZE // 2)
    return {
        "flat": torch.ones(SIZE),
        "linear": 0.05 + 0.95 * ramp,
        "one decade": 10 ** (ramp - 1),
        "two decades": 10 ** (2 * ramp - 2),
        "power law": 1 / torch.arange(1.0, SIZE + 1),
        "one large": torch.cat([torch.tensor([1.0]), torch.full((SIZE - 1,), 0.02)]),
        "two levels": torch.cat([ones, 0.03 * ones]),
        "quadratic": 0.02 + 0.98 * ramp**2,
    }


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its exact orthogonal factor."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, SIZE, generator=generator, dtype=torch.float64))[0] for n in (rows, columns))
    return (u * values @ v.T).float(), u @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quintic_equals_torch_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for scale in (1.0, 1e-12, 0.0):
            matrix = (scale * torch.randn(shape, generator=generator)).to(dtype)
            before = matrix.clone()
            expected = torch_newton_schulz(matrix.clone(), QUINTIC, 5, 1e-7)
            assert torch.equal(orthogonalize(matrix, "quintic"), expected), (shape, scale)
            assert torch.equal(matrix, before), "the argument was changed"


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 4 * SIZE), (3 * SIZE, SIZE)])
@pytest.mark.parametrize("name", spectra())
def test_eight_spectra(name: str, shape: tuple[int, int]) -> None:
    """Orthogonality and singular values: quintic within 0.68 .. 1.21, the others within 0.82 .. 1.15."""
    matrix, exact = with_spectrum(spectra()[name], *shape)
    errors = {}
    for method in METHODS:
        result = orthogonalize(matrix, method).double()
        values = torch.linalg.svdvals(result)
        lowest, highest = (0.67, 1.22) if method == "quintic" else (0.82, 1.15)
        assert lowest < values.min() and values.max() < highest, method
        errors[method] = ((result - exact).norm() / exact.norm()).item()
    assert errors["quintic"] < 0.32 and errors["polar-express"] < 0.125 and errors["gram"] < 0.135
    assert abs(errors["gram"] - errors["polar-express"]) < 0.045  # the same polynomials


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hard_spectra_do_not_explode(method: str, dtype: torch.dtype) -> None:
    """Rank-deficient and ill-conditioned matrices: what is too small to see must not grow."""
    for values in (torch.arange(SIZE) < 9, 10 ** torch.linspace(0, -6, SIZE), torch.arange(SIZE) < 1):
        matrix, _ = with_spectrum(values.float(), SIZE, 4 * SIZE)
        for scale in (1.0, 1e-12, 1e12):
            highest = torch.linalg.svdvals(orthogonalize(scale * matrix, method, dtype=dtype).float()).max()
            assert highest < 1.25, (scale, highest)


def test_gram_restarts_below_float32() -> None:
    """In bfloat16 at most two iterations without a restart, in float16 three; without any, it explodes."""
    for steps in range(1, 12):
        for dtype, longest in ((torch.bfloat16, 2), (torch.float16, 3), (torch.float32, steps)):
            parts = segments(steps, dtype)
            assert max(map(len, parts)) <= longest
            assert [step for part in parts for step in part] == coefficients("gram", steps)
    assert [len(part) for part in segments(5, torch.bfloat16)] == [1, 2, 2]
    matrix, _ = with_spectrum((torch.arange(SIZE) < 9).float(), SIZE, 4 * SIZE)
    x = (matrix / matrix.norm()).bfloat16()
    unsafe = gram_part(x, coefficients("gram", 5), False)
    assert not unsafe.abs().max() < 10.0
    assert orthogonalize(matrix, "gram").abs().max() < 1.2


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices(method: str) -> None:
    """Up to a few last bits: batched products of small matrices may round otherwise."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 512), (512, 16), (5, 7), (64, 64), (100, 65)):
        batch = torch.randn(7, *shape, generator=generator)
        batch[3] = 0.0
        alone = torch.stack([orthogonalize(matrix, method) for matrix in batch])
        together = orthogonalize(batch, method)
        assert (together != alone).float().mean() < 0.5, shape
        assert (together - alone).float().norm() < 0.01 * alone.float().norm(), shape
        assert together[3].count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(256, 256), (130, 517), (6, 33, 70)])
def test_symmetric_products_change_only_rounding(method: str, shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        whole, halves = (orthogonalize(matrix, method, dtype=dtype, symmetric=flag).float() for flag in (False, True))
        assert (whole - halves).norm() < tolerance * whole.norm()


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_scale_of_a_matrix_does_not_matter(method: str) -> None:
    """A power of two changes no bit; torch's quintic gives up below a norm of 1e-7."""
    matrix = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonalize(matrix * 2.0**-40, method), orthogonalize(matrix, method))


def test_flops() -> None:
    """The whole 6.9 B model: 616 TFLOP in standard form, 501 with the Gram form; 12 s^2 l + 22 s^3 for one matrix."""
    shapes = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
    assert flops(100, 1000) == 12 * 100**2 * 1000 + 22 * 100**3
    assert flops(1000, 100, dtype=torch.float16) == 8 * 100**2 * 1000 + 28 * 100**3
    assert flops(100, 149) == flops(149, 100, "quintic") == 20 * 100**2 * 149 + 10 * 100**3
    assert round(sum(32 * flops(*shape, "polar-express") for shape in shapes) / 1e12) == 616
    assert round(sum(32 * flops(*shape, "gram") for shape in shapes) / 1e12) == 501


def test_what_is_refused() -> None:
    for arguments in ((torch.ones(3), "gram", 5), (torch.ones(3, 3), "cubic", 5), (torch.ones(3, 3), "gram", 0)):
        with pytest.raises(ValueError, match="expected one of"):
            orthogonalize(*arguments)
