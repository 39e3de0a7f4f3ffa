"""The orthogonal factor of a matrix with a floor under its singular values: no rounding is lifted to full size.

Newton-Schulz iterations bring every singular value near 1, those that are nothing but rounding too: a gradient of rank
3 has hundreds of them, which together outweigh the three. With a floor f, U S V^T becomes U min(1, S / (f s_max)) V^T:
the orthogonal factor where a singular value is at least f of the greatest, and proportional to it below. Noise grows
by 1 / f at most, and the factor is a Lipschitz function of the matrix, which the exact orthogonal one is not.

Shapes: matrices are [m, n] or [batch, m, n]; s is the shorter and l the longer of m and n.

- Up to s = 64 (LoRA), exactly: by the eigenvalues of the s x s Gram matrix, in float64.
- Above, by Polar Express polynomials (https://arxiv.org/abs/2505.16932) made for the interval [f, 1], whose slope at 0
  is about 1.5 / f. The matrix is divided by its Schatten-8 norm (sum of s_i^8)^(1/8), which is at least the greatest
  singular value, at most s^(1/8) times that (2.8 at s = 4096), and costs no product: the first polynomial needs R^2.

In the literature: a damped inverse square root (Shampoo's epsilon, https://arxiv.org/abs/1802.09568) gives
S / sqrt(S^2 + tau^2), which needs a second matrix through every restart; Polar Express itself recommends to know the
lowest singular value that matters; PolarGrad (https://arxiv.org/abs/2505.21799) scales the factor by the nuclear norm,
which leaves the ratio of noise to signal as it is; MuonClip (https://arxiv.org/abs/2507.20534) clips attention logits.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from unlearn.optim.newton_schulz import (
    GRAM_ASPECT,
    SAFETY,
    TINY,
    Coefficients,
    Method,
    gram_part,
    orthogonalize,
    product,
)
from unlearn.optim.newton_schulz import flops as iteration_flops

FLOOR = 1e-2  # the default; `python benchmarks/muon.py --floor` shows others
HIGHEST_FLOOR = 0.1  # above it, most of a real gradient would be damped
EXACT_SIDE = 64  # short sides up to which the factor is computed by eigenvalues
REACHED = 0.95  # what the fewest iterations bring the floor itself to
CUSHION = (
    0.02407327424182761  # polynomials are made for no wider an interval than this: Polar Express, Implementation 1
)
RESTART = {torch.float32: 8, torch.float16: 2, torch.bfloat16: 1}  # iterations of the Gram form between two restarts


def arithmetic(device: torch.device) -> torch.dtype:
    """The dtype of the iteration: float16 on a GPU, which has eight times bfloat16's precision at its speed, and the
    range that a normalised matrix needs; float32 on a CPU, where bfloat16 is faster on one make only."""
    return torch.float16 if device.type == "cuda" else torch.float32


def wire_dtype(rows: int, columns: int, floor: float) -> torch.dtype:
    """The dtype in which a [rows, columns] matrix goes to the rank that orthogonalises it, and comes back: float32
    where the factor is exact, since bfloat16 alone leaves noise of 1e-4 of the greatest singular value."""
    return torch.float32 if floor > 0.0 and min(rows, columns) <= EXACT_SIDE else torch.bfloat16


def polar_factor(
    matrix: Tensor,
    method: Method = "gram",
    *,
    floor: float = FLOOR,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Tensor:
    """U min(1, S / (floor s_max)) V^T of each matrix U S V^T; a matrix of zeros stays zero.

    Above a short side of 64, approximately: the polynomials reach 1 within some per cent, and the Schatten-8 norm, up
    to s^(1/8) times s_max, stands for s_max.

    Args:
        matrix: [m, n] or [batch, m, n] of any floating dtype; Frobenius norms below 1e19.
        method: `gram` or `polar-express`: the same polynomials on the s x s Gram matrix or in standard form. `quintic`
            has no floor.
        floor: share of the greatest singular value, up to 0.1; 0 is `orthogonalize`, without a floor.
        steps: iterations; by default the fewest that bring the floor itself to 0.95, and 5 without a floor.
        dtype: of the iteration; by default `arithmetic` of the device.
        overwrite: the iteration may use the memory of `matrix`, whose numbers are then lost.

    Returns:
        [m, n] or [batch, m, n], contiguous or transposed, in the dtype of `matrix`.

    Raises:
        ValueError: `quintic` with a floor, or a floor outside of [0, 0.1].
    """
    if floor == 0.0:
        return orthogonalize(matrix, method, 5 if steps is None else steps, overwrite=overwrite)
    if not 0.0 < floor <= HIGHEST_FLOOR or method == "quintic":
        raise ValueError(f"expected a floor in [0, {HIGHEST_FLOOR}], 0 with quintic; found {floor} with {method}")
    if min(matrix.shape[-2:]) <= EXACT_SIDE:
        return _exact(matrix, floor)
    result, tall = matrix.dtype, matrix.shape[-2] > matrix.shape[-1]
    x = _normalized(matrix, dtype or arithmetic(matrix.device))
    del matrix  # where no reference is left, its memory serves the iteration
    table, length = polynomials(floor, steps), _segment(x.shape[-2], x.shape[-1], method, x.dtype)
    for start in range(0, len(table), length):
        x = gram_part(x, table[start : start + length], tall, normalize=by_schatten_norm if start == 0 else None)
    return x.to(result)


def _exact(matrix: Tensor, floor: float) -> Tensor:
    """G max(G^T G, tau^2 I)^(-1/2) with tau = floor s_max, the maximum taken of eigenvalues."""
    x = matrix.double()
    tall = x.shape[-2] > x.shape[-1]
    values, vectors = torch.linalg.eigh(x.mT @ x if tall else x @ x.mT)
    lowest = (floor**2 * values[..., -1:]).clamp(min=torch.finfo(torch.float64).tiny)
    root = (vectors * values.maximum(lowest).rsqrt()[..., None, :]) @ vectors.mT
    return (x @ root if tall else root @ x).to(matrix.dtype)


def _normalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """With a Frobenius norm of sqrt(s): elements of about l^(-1/2), and X X^T up to s, are inside float16's range."""
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = matrix.new_empty(matrix.shape, dtype=dtype)
    return torch.mul(matrix, math.sqrt(min(matrix.shape[-2:])) / norm.clamp(min=TINY), out=x)


def _segment(rows: int, columns: int, method: Method, dtype: torch.dtype) -> int:
    """Iterations between two restarts of the Gram form; 1 is the standard form."""
    short, long = min(rows, columns), max(rows, columns)
    return RESTART[dtype] if method == "gram" and long >= GRAM_ASPECT * short else 1


def by_schatten_norm(r: Tensor) -> tuple[Tensor, Tensor]:
    """Divide R = X X^T by the square of X's Schatten-8 norm, in place; 1 / that norm, and R^2.

    ||R||_F is the square of the Schatten-4 norm, ||R^2||_F the fourth power of the Schatten-8 norm. The lower bounds
    are below what any matrix of trace s gives: they are there for zeros.
    """
    first = _frobenius(r).clamp(min=0.5)
    r.div_(first)
    square = product(r, r)
    second = _frobenius(square).clamp(min=1e-4).sqrt()
    r.div_(second)
    square.div_(second.square())
    return (first * second).rsqrt(), square


def _frobenius(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float32)


@lru_cache
def polynomials(floor: float, steps: int | None = None) -> tuple[Coefficients, ...]:
    """(a, b, c) of each iteration x <- a x + b x^3 + c x^5, that bring [floor, 1] near 1, each the best for what the
    ones before it leave: Polar Express, algorithm 1 and implementation 1.

    Args:
        floor: in (0, 1).
        steps: how many; by default the fewest that bring the floor to 0.95.
    """
    low, high = floor / SAFETY, 1.0
    table: list[Coefficients] = []
    while not table or (len(table) < steps if steps is not None else low < REACHED):
        a, b, c = _best_quintic(max(low, CUSHION * high), high)
        if low < CUSHION * high:  # made for a narrower interval: centre what it does to the whole one
            scale = 2.0 / sum(a * x + b * x**3 + c * x**5 for x in (low, high))
            a, b, c = a * scale, b * scale, c * scale
        low = a * low + b * low**3 + c * low**5
        high = 2.0 - low
        table.append((a, b, c))
    # the first one takes x / SAFETY: rounding may push a singular value above the interval, where polynomials explode
    a, b, c = table[0]
    return ((a / SAFETY, b / SAFETY**3, c / SAFETY**5), *table[1:])


def _best_quintic(low: float, high: float) -> Coefficients:
    """The odd quintic p of least max |1 - p(x)| on [low, high], by Remez: 1 - p is e, -e, e, -e at low, the two inner
    extrema and high."""
    if low > (1.0 - 5e-6) * high:  # the limit
        return 1.875 / high, -1.25 / high**3, 0.375 / high**5
    points, error = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high], math.inf
    while True:
        rows = [[x, x**3, x**5, (-1.0) ** index] for index, x in enumerate(points)]
        solution = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        a, b, c, found = solution.tolist()
        if abs(error - found) <= 1e-14:
            return a, b, c
        root = math.sqrt(9.0 * b * b - 20.0 * a * c)
        points[1:3] = [math.sqrt((-3.0 * b + sign * root) / (10.0 * c)) for sign in (-1.0, 1.0)]
        error = found


def flops(rows: int, columns: int, method: Method = "gram", *, floor: float = FLOOR, steps: int | None = None) -> int:
    """Floating-point operations of one [rows, columns] matrix, on a GPU.

    With a floor, a segment of k iterations on the Gram matrix takes 4 s^2 l + (8 k - 6) s^3, as without. Up to a short
    side of 64: 4 s^2 l, and about 12 s^3 for the eigenvalues.
    """
    if floor == 0.0:
        return iteration_flops(rows, columns, method, 5 if steps is None else steps)
    short, long = min(rows, columns), max(rows, columns)
    if short <= EXACT_SIDE:
        return 4 * short * short * long + 12 * short**3
    count = len(polynomials(floor, steps))
    length = _segment(rows, columns, method, torch.float16)
    lengths = [min(length, count - start) for start in range(0, count, length)]
    return sum(4 * short * short * long + (8 * k - 6) * short**3 for k in lengths)
