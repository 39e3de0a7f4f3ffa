"""Muon's orthogonal factor: how exact it is, what it makes of rounding, and what it costs, by method, shape and floor.

    python benchmarks/polar.py                     # the table of benchmarks/README.md
    python benchmarks/polar.py --gpu               # on one CUDA device, the 6.9 B model's shapes too

Gradients of four kinds: of full rank; of rank 3; with singular values from 1 to 1e-4; with a power law 1 / k. Each goes
through what it goes through in an optimizer step: to its owner in bfloat16 (float32 where the factor is exact), and
there through the arithmetic of the device. Reported: the distance to the exact floored factor, from the singular value
decomposition in float64, over its norm; what a relative perturbation of 1e-7, as another order of float32 sums makes,
changes, over the norm; the norm of the rank-3 update, which is sqrt(3) = 1.73 without noise; and the median time.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unlearn.optim.newton_schulz import Method
from unlearn.optim.polar import polar_factor, wire_dtype

SHAPES = [(512, 16), (64, 64), (256, 256), (512, 2048), (2048, 512)]
TRUE = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
WAYS: list[tuple[Method, float]] = [
    ("quintic", 0.0),
    ("gram", 0.0),
    ("gram", 1e-3),
    ("gram", 3e-3),
    ("gram", 1e-2),
    ("gram", 3e-2),
    ("polar-express", 1e-2),
]


def gradients(rows: int, columns: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(kind, [rows, columns] float32)."""
    generator, short = torch.Generator().manual_seed(0), min(rows, columns)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    yield "full rank", random(rows, columns).float()
    yield "rank 3", (random(rows, 3) @ random(3, columns)).float()
    u, v = (torch.linalg.qr(random(size, short))[0] for size in (rows, columns))
    order = torch.arange(1, short + 1, dtype=torch.float64, device=device)
    yield "to 1e-4", (u * 10 ** (-4 * (order - 1) / (short - 1)) @ v.T).float()
    yield "1 / k", (u / order @ v.T).float()


def exact(matrix: Tensor, floor: float) -> Tensor:
    """U min(1, S / (floor s_max)) V^T in float64; without a floor U V^T."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u * (s / (floor * s[0])).clamp(max=1.0) @ v if floor > 0.0 else u @ v


def perturbed(matrix: Tensor) -> Tensor:
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (matrix.double() * (1.0 + 1e-7 * noise.to(matrix.device))).float()


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:])


def row(method: Method, floor: float, rows: int, columns: int, device: torch.device, repeats: int) -> str:
    """One line of the table."""
    cells = []
    sent, norm = torch.empty(0), 0.0
    for kind, matrix in gradients(rows, columns, device):
        sent = matrix.to(wire_dtype(rows, columns, floor))
        found = polar_factor(sent, method, floor=floor).double()
        again = polar_factor(perturbed(matrix).to(sent.dtype), method, floor=floor).double()
        expected = exact(matrix, floor)
        distance = (found - expected).norm() / expected.norm()
        cells.append(f"{distance:9.3f}{(found - again).norm() / found.norm():10.0e}")
        norm = found.norm().item() if kind == "rank 3" else norm
    taken = milliseconds(lambda: polar_factor(sent, method, floor=floor), repeats)
    return f"{f'[{rows}, {columns}]':16}{method:14}{floor:7.3f}" + "".join(cells) + f"{norm:9.2f}{taken:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--gpu", action="store_true", help="on one CUDA device, the 6.9 B model's shapes too")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if flags.gpu else "cpu")
    kinds = ("full rank", "rank 3", "to 1e-4", "1 / k")
    print(f"{'shape':16}{'method':14}{'floor':>7}" + "".join(f"{kind:>10}{'1e-7':>9}" for kind in kinds), end="")
    print(f"{'rank 3':>9}{'ms':>10}")
    for rows, columns in SHAPES + (TRUE if flags.gpu else []):
        for method, floor in WAYS:
            print(row(method, floor, rows, columns, device, flags.repeats), flush=True)


if __name__ == "__main__":
    main()
