"""The methods that push on predictions, at several ranks: the gradients of one."""

from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from test_adversary import ADVERSARY
from test_latent_attack import ATTACK
from test_output_methods import CASES, LAST, assembled, inputs
from torch import Tensor

from unlearn.trainer import gradients, summed
from unlearn.weights import full

__all__ = ["inputs"]  # a fixture
pytestmark = pytest.mark.usefixtures("token_cache")


def of_all(home: Path, inputs: Path, flags: dict[str, Any]) -> dict[str, tuple[dict[str, float], dict[str, Tensor]]]:
    """The numbers to log and the gradients of a step with a short batch, for every method; of an adversary's, once it
    has learnt from two batches."""
    found = {}
    for name, more in [(name, {}) for name in CASES] + [("npo under attack", ATTACK), ("npo beside", ADVERSARY)]:
        run = assembled(home, name.removesuffix(" under attack").removesuffix(" beside"), inputs, **flags, **more)
        for step in range(2) if more == ADVERSARY else ():
            gradients(run.model, run.loss, step, LAST + 1)
            run.model.zero_grad()
            after_step = run.hooks_of(run.phases[0]).after_step
            assert after_step is not None
            after_step(step + 1)
        numbers = gradients(run.model, run.loss, LAST, LAST + 1)
        whole = {key: full(p.grad) for key, p in run.model.named_parameters() if p.requires_grad and p.grad is not None}
        found[name] = summed(numbers, run.parts.device), whole
    return found


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, {"micro_batch": 1, "shard": "replicate"}),
        (3, {"micro_batch": 2, "shard": "full"}),
        pytest.param(4, {"micro_batch": 2, "shard": "hybrid", "shard_size": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"micro_batch": 1, "shard": "full", "lora_rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_method_at_several_ranks(home: Path, inputs: Path, ranks: int, flags: dict[str, Any]) -> None:
    """The last batch has a window for one rank alone; but for the order of float32 sums they agree."""
    expected = of_all(home, inputs, {"micro_batch": 6, "lora_rank": flags.get("lora_rank", 0)})
    for found in run_ranks(ranks, of_all, home, inputs, flags):
        for name, (numbers, whole) in expected.items():
            rel = 1e-3 if "attack" in name else 1e-5  # Adam makes rounding large where a gradient is nothing
            assert found[name][0] == pytest.approx(numbers, rel=rel, abs=1e-6), name
            for key, gradient in whole.items():
                assert (found[name][1][key] - gradient).norm() <= rel * gradient.norm() + 1e-6, (name, key)
