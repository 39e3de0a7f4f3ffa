"""The uniform loss against the naive way: time and extra memory of loss and gradient.

    python benchmarks/loss.py

One thread, float32, V = 50,304, D = 512, 4 layers of 1,024 tokens. Both ways alternate in one process, so that a noisy
machine is noisy for both; medians are compared. Extra memory is the peak above the inputs, from torch's own profiler.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from measure import peak_bytes
from torch import Tensor

from unlearn.losses import uniform_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def naive(hidden: Tensor, unembedding: Tensor) -> Tensor:
    """All logits at once, log-softmax over them, and autograd."""
    return -torch.log_softmax(hidden @ unembedding.T, dim=-1).mean() / math.log(unembedding.shape[0])


def run(loss: Loss, layers: list[Tensor], unembedding: Tensor) -> None:
    """Loss and gradient of all layers together, as one objective has them."""
    torch.stack([loss(layer, unembedding) for layer in layers]).mean().backward()
    for layer in layers:
        layer.grad = None


def seconds(loss: Loss, layers: list[Tensor], unembedding: Tensor) -> float:
    started = time.perf_counter()
    run(loss, layers, unembedding)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    repeats, tokens = parser.parse_args().repeats, parser.parse_args().tokens
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(50304, 512, generator=generator) * 0.05
    layers = [torch.randn(tokens, 512, generator=generator).requires_grad_() for _ in range(4)]
    times: dict[str, list[float]] = {"naive": [], "chunked": []}
    for _ in range(repeats):
        times["naive"].append(seconds(naive, layers, unembedding))
        times["chunked"].append(seconds(uniform_cross_entropy, layers, unembedding))
    memory = {
        "naive": peak_bytes(lambda: run(naive, layers, unembedding)),
        "chunked": peak_bytes(lambda: run(uniform_cross_entropy, layers, unembedding)),
    }
    for name in times:
        print(f"{name:8} {statistics.median(times[name]):7.2f} s {memory[name] / 2**20:9.0f} MiB")
    time_ratio = statistics.median(times["chunked"]) / statistics.median(times["naive"])
    print(f"chunked / naive: time {time_ratio:.2f}, extra memory {memory['chunked'] / memory['naive']:.3f}")


if __name__ == "__main__":
    main()
