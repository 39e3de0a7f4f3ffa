"""What a run costs, so that methods can be compared at equal compute: passes over tokens, arithmetic, time, memory.

A token forward is one real token through a whole model; a pass that ends early counts as the share of the blocks that
it runs. Tokens of the original and of a teacher count too. Padding, evaluation and recomputed activations do not.
"""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unlearn.config import TrainConfig
from unlearn.distributed import gather
from unlearn.memory import GIB, Shape, differentiated, flops_per_token, orthogonalisation, reach
from unlearn.methods.terms import Term


@dataclass(frozen=True)
class Passes:
    """Of one optimizer step, or the sum of several, over all ranks.

    Attributes:
        forward, backward: tokens. flops: multiply-adds times two, see `memory.flops_per_token`.
    """

    forward: float = 0.0
    backward: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward, self.flops + other.flops)

    def as_numbers(self) -> dict[str, float]:
        """As the log and run.json name them."""
        return {"tokens_forward": self.forward, "tokens_backward": self.backward, "flops": self.flops}


def passes_of_step(
    config: TrainConfig, shape: Shape, terms: Sequence[Term], step: int, weights: Sequence[float]
) -> Passes:
    """What one optimizer step takes: a term whose weight is 0 is measured, and not differentiated."""
    total = Passes(flops=orthogonalisation(config, shape))
    for term, weight in zip(terms, weights, strict=True):
        tokens, needs = term.batches.tokens(step), term.needs
        run, back = reach(needs, shape), differentiated(needs, shape)
        total += Passes(
            forward=tokens * needs.forward * run / shape.depth,
            backward=tokens * needs.backward * back / shape.depth if weight else 0.0,
            flops=tokens * flops_per_token(config, shape, needs, backward=weight != 0.0),
        )
    return total


class CpuTime:
    """CPU seconds of all ranks on a run: since this was made, and `before`, in the attempts before."""

    def __init__(self) -> None:
        self._start, self.before = time.process_time(), 0.0

    def seconds(self) -> float:
        """Every rank must call it."""
        return round(self.before + sum(gather(time.process_time() - self._start)), 3)


def held_gib(device: torch.device) -> float:
    """The most memory that this process has held: of its GPU, as torch gave it out, or else of its host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # which Linux counts in KiB


def peak_gib(device: torch.device) -> float:
    """The same of the rank that has held most. Every rank must call it."""
    return max(gather(held_gib(device)))
