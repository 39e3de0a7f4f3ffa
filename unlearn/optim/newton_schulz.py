"""The orthogonal factor U V^T of a matrix U S V^T, by matrix products alone.

Shapes: matrices are [m, n] or [batch, m, n]; s is the shorter and l the longer of m and n. Every method repeats
X <- p(X) = a X + b (X X^T) X + c (X X^T)^2 X, which moves each singular value to p of it and leaves U and V alone.

- `quintic`: the coefficients, the operations and their order of `torch.optim.Muon`: in bfloat16, equal to the bit.
- `polar-express`: for the same work, coefficients that come nearer to 1.
- `gram`: the same polynomials as `polar-express`, computed on the s x s Gram matrix where that is less work.

Which to take, as `python benchmarks/muon.py` measures it: `gram`, unless torch's very bits are wanted.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["quintic", "polar-express", "gram"]
Coefficients = tuple[float, float, float]

# Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: steep at 0, so that five steps bring every
# singular value near 1 (into about 0.7..1.2), rather than exactly to 1.
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco, Gower 2025, The Polar Express, https://arxiv.org/abs/2505.16932, Implementation 1: each is the
# best odd quintic for what the ones before it leave of [1e-3, 1]; the last is the limit, and repeats.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# p(x / SAFETY) instead of p(x): bfloat16 may push a singular value above the interval, outside of which p explodes.
# 1.01 in the paper; 1.05 as in Gram Newton-Schulz (Zhang, Amsel, Chen, Dao 2026).
SAFETY = 1.05

GRAM_ASPECT = 1.5  # l / s from which the Gram form is less work
# Iterations before which the Gram form returns to X, as (first, spacing). Without restarts, rounding makes the smallest
# eigenvalues of the Gram matrix negative, and the polynomials blow them up: singular values reach 1e16 in bfloat16.
# float32 needs none in the usual five steps.
RESTARTS = {torch.bfloat16: (1, 2), torch.float16: (2, 3)}

TINY = 1e-15  # below every norm whose square float32 can hold; a matrix of zeros stays one
PANELS = 4  # row panels of a symmetric product


def orthogonalize(
    matrix: Tensor,
    method: Method = "gram",
    steps: int = 5,
    *,
    dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each `matrix`, approximately.

    Args:
        matrix: [m, n] or [batch, m, n] of any floating dtype; a matrix of zeros stays zero. Frobenius norms below 1e19,
            whose squares float32 can hold.
        method: see the module's docstring.
        steps: iterations.
        dtype: of the arithmetic: bfloat16, float16 or float32. Sums inside a product are float32 in all of them.
        symmetric: compute only the upper block triangle of products that are symmetric, and mirror it: 0.625 of their
            multiplications in smaller products. It pays where those still fill the device: not on a CPU with bfloat16
            matrix units (AMX: 0.85 of the product's time at s = 1024, above 1 at s = 512), hence not the default.
        overwrite: the iteration may use the memory of `matrix`, whose numbers are then lost.

    Returns:
        [m, n] or [batch, m, n] in `dtype`, with singular values near 1. Tall matrices may come back as a transposed
        view, except from `gram`. A batch gives each matrix what it gets alone, up to the rounding of batched products.

    Raises:
        ValueError: an unknown method, fewer than one step, or another number of dimensions.
    """
    if method not in get_args(Method) or steps < 1 or matrix.ndim not in (2, 3):
        raise ValueError(
            f"expected one of {get_args(Method)}, 1 step or more and 2 or 3 dimensions; found {method!r}, {steps} and "
            f"{matrix.ndim}"
        )
    tall = matrix.shape[-2] > matrix.shape[-1]
    in_gram_form = method == "gram" and max(matrix.shape[-2:]) >= GRAM_ASPECT * min(matrix.shape[-2:])
    as_torch = method == "quintic" and dtype == torch.bfloat16
    if as_torch:
        x = _normalized_as_torch(matrix, tall, overwrite)
    elif in_gram_form and dtype != torch.float16 and matrix.dtype != torch.float16:
        x = matrix.to(dtype).contiguous()  # the first part normalises its Gram matrix, which may be smaller
    else:
        x = _normalized(matrix, tall and not in_gram_form, dtype, overwrite)
    del matrix  # as below: where no reference is left, its memory serves the iteration
    if in_gram_form:
        for index, part in enumerate(segments(steps, dtype)):
            x = gram_part(x, part, tall, symmetric=symmetric, normalize=by_trace if index == 0 else None)
        return x
    for iteration in coefficients(method, steps):
        x = _step(x, iteration, symmetric)
    return x.mT if tall else x


def coefficients(method: Method, steps: int) -> list[Coefficients]:
    """(a, b, c) of each iteration."""
    if method == "quintic":
        return [QUINTIC] * steps
    scaled = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return (scaled + [POLAR_EXPRESS[-1]] * max(0, steps - len(scaled)))[:steps]


def segments(steps: int, dtype: torch.dtype) -> list[list[Coefficients]]:
    """The iterations of the Gram form, cut before each restart."""
    table = coefficients("gram", steps)
    starts = [0, *(range(RESTARTS[dtype][0], steps, RESTARTS[dtype][1]) if dtype in RESTARTS else ()), steps]
    return [table[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def flops(
    rows: int, columns: int, method: Method = "gram", steps: int = 5, *, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Floating-point operations of one [rows, columns] matrix, two for each multiply-add of its products.

    The standard form takes 4 s^2 l + 2 s^3 an iteration; the Gram form 4 s^2 l a segment, and 2 s^3 an iteration for
    R^2, 2 s^3 for Q except in a segment's first, 4 s^3 for R except in its last.
    """
    s, long = min(rows, columns), max(rows, columns)
    if method != "gram" or long < GRAM_ASPECT * s:
        return steps * (4 * s * s * long + 2 * s**3)
    lengths = [len(segment) for segment in segments(steps, dtype)]
    return sum(4 * s * s * long + (8 * length - 6) * s**3 for length in lengths)


def _normalized_as_torch(matrix: Tensor, tall: bool, overwrite: bool) -> Tensor:
    """Wide view with Frobenius norm at most 1, with torch's operations: the transpose stays a view, whose products may
    have other bits than those of a copy; the norm is rounded to bfloat16 and bounded by 1e-7."""
    x = (matrix.mT if tall else matrix).to(torch.bfloat16)
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    return x.div_(norm) if overwrite else x.div(norm)


def _normalized(matrix: Tensor, tall: bool, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """Contiguous, with Frobenius norm 1, however small the matrix is; transposed if it is tall."""
    wider = torch.float32 if matrix.dtype == torch.float16 else None  # whose squares overflow from 256 on
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=wider).clamp(min=TINY)
    if tall:
        return matrix.mT.clone(memory_format=torch.contiguous_format).div_(norm).to(dtype)
    x = matrix.contiguous()
    return (x.div_(norm) if overwrite else x.div(norm)).to(dtype)


def _step(x: Tensor, iteration: Coefficients, symmetric: bool) -> Tensor:
    """a X + (b G + c G^2) X with G = X X^T."""
    a, b, c = iteration
    gram = product(x, x.mT, symmetric=symmetric)
    gram = product(gram, gram, add=gram, beta=b, alpha=c, symmetric=symmetric)
    return product(gram, x, add=x, beta=a)


def gram_part(
    x: Tensor,
    part: Sequence[Coefficients],
    tall: bool,
    *,
    symmetric: bool = False,
    normalize: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> Tensor:
    """Several steps at once, on R = X X^T: with W = a I + b R + c R^2, Q <- Q W and R <- W R W, last Q X. A tall X has
    R = X^T X and becomes X Q: it is never transposed.

    To normalise X, R is divided by the square of a norm of X, and Q by the norm: two passes over s x s instead of
    s x l.

    Args:
        normalize: divides R in place; gives what to multiply X by, [.., 1, 1], and R^2 if it came by it.
    """
    r = product(x.mT, x, symmetric=symmetric) if tall else product(x, x.mT, symmetric=symmetric)
    scale, square = (None, None) if normalize is None else normalize(r)
    q = None
    *earlier, last = part
    for iteration in earlier:
        w = polynomial(r, iteration, symmetric, square)
        square = None
        q = w if q is None else product(q, w, symmetric=symmetric)
        r = product(r, w, symmetric=symmetric)
        r = product(w, r, symmetric=symmetric)
        del w  # here and below: memory that is not needed is free for the next product
    if q is None:
        q = polynomial(r, last, symmetric, square)
    else:  # Q (a I + Z) with Z = b R + c R^2: in W, a would swallow digits of Z
        a, b, c = last
        z = product(r, r, add=r, beta=b, alpha=c, symmetric=symmetric)
        q = product(q, z, add=q, beta=a, symmetric=symmetric)
        del z
    del r, square
    if scale is not None:
        q.mul_(scale)
    return x @ q if tall else q @ x


def by_trace(r: Tensor) -> tuple[Tensor, None]:
    """Divide R = X X^T by its trace, the squared Frobenius norm of X; in place."""
    # in float64, where a sum in any order is the same: alone or in a batch
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).clamp(min=TINY**2)
    scale = trace.rsqrt().to(r.dtype)[..., None, None]
    r.mul_(scale.square())
    return scale, None


def polynomial(r: Tensor, iteration: Coefficients, symmetric: bool, square: Tensor | None = None) -> Tensor:
    """a I + b R + c R^2; in the memory of R^2 where that is given."""
    a, b, c = iteration
    if square is None:
        w = product(r, r, add=r, beta=b, alpha=c, symmetric=symmetric)
    else:
        w = square.mul_(c).add_(r, alpha=b)
    w.diagonal(dim1=-2, dim2=-1).add_(a)
    return w


def product(
    left: Tensor,
    right: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    symmetric: bool = False,
) -> Tensor:
    """beta add + alpha left right, of matrices or batches of them."""
    if symmetric and left.shape[-2] >= PANELS:
        return _symmetric_product(left, right, add, beta, alpha)
    if add is None:
        return left @ right
    function = torch.addmm if left.ndim == 2 else torch.baddbmm
    return function(add, left, right, beta=beta, alpha=alpha)


def _symmetric_product(left: Tensor, right: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    """The same where the result is known to be symmetric: row panels of the upper half, mirrored."""
    size = left.shape[-2]
    out = left.new_empty(*left.shape[:-1], size)
    step = -(-size // PANELS)
    for start in range(0, size, step):
        end = min(start + step, size)
        part = None if add is None else add[..., start:end, start:]
        out[..., start:end, start:] = product(
            left[..., start:end, :], right[..., :, start:], add=part, beta=beta, alpha=alpha
        )
        out[..., end:, start:end] = out[..., start:end, end:].mT
    return out
