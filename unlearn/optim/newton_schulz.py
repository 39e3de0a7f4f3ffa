"""Newton-Schulz iteration: the orthogonal factor of a matrix by matrix products alone."""

import torch
from torch import Tensor

# Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: steep at 0, so that five steps bring every
# singular value near 1 (into about 0.7..1.2), rather than exactly to 1.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix to `matrix`, approximately.

    Computed in bfloat16 with the operations and the order of `torch.optim.Muon`, so that both agree to the bit.

    Args:
        matrix: [m, n] of any floating dtype; zero stays zero.
        steps: iterations, each X <- a X + (b X X^T + c (X X^T)^2) X, on the wide side of the matrix.

    Returns:
        bfloat16 [m, n] with singular values near 1.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))  # the spectral norm is at most the Frobenius norm
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
