"""Filters and budgets at several ranks: the gradients and the damage of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_filters import assembled
from torch import Tensor

from unlearn.trainer import gradients
from unlearn.weights import full, local_rows

pytestmark = pytest.mark.usefixtures("token_cache")

# The mask is no continuous function of the retain gradient: its entries that are rounding may fall either way.
FILTERS: tuple[dict[str, Any], ...] = (
    {"filter": ("collapse", "normalise"), "filter_rank": 3},
    {"filter": ("collapse",), "filter_rank": 3, "filter_hard": True},
    {"filter": ("sign-mask",), "train": "mlp.dense.*weight"},
)


def of_all(home: Path, flags: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The gradients of the second step of each, with what the first has left in the means."""
    found = []
    for filters in FILTERS:
        run = assembled(home, **(filters | flags))
        for step in range(2):
            run.model.zero_grad()
            gradients(run.model, run.loss_of(run.phases[0]), step, 5, run.hooks_of(run.phases[0]).filter)
        trained = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
        found.append({name: full(p.grad).clone() for name, p in trained.items() if p.grad is not None})
    return found


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, {"micro_batch": 1, "shard": "replicate"}),
        (3, {"micro_batch": 1, "shard": "full"}),
        pytest.param(4, {"micro_batch": 1, "shard": "hybrid", "shard_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_filters_at_several_ranks(home: Path, ranks: int, flags: dict[str, Any]) -> None:
    expected = of_all(home, {"micro_batch": 1})
    for found in run_ranks(ranks, of_all, home, flags):
        for one, other in zip(expected, found, strict=True):
            for name, gradient in one.items():
                difference = (other[name] - gradient).abs()
                if len(one) < 20:  # the mask: all but a few entries, which are small
                    assert (difference > 1e-5 * gradient.abs().max()).float().mean() < 0.01, name
                else:
                    # the top directions of a mean whose values differ by a tenth turn ten times as far as it does
                    assert difference.norm() <= 1e-3 * gradient.norm() + 1e-6, name


def damage(home: Path, flags: dict[str, Any]) -> dict[str, float]:
    run = assembled(home, stop_at=("kl=0.5", "loss=0.5"), examples=8, batch=4, stop_windows=5, micro_batch=2, **flags)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        rows, first = local_rows(parameter.detach())
        rows += 0.1 * torch.randn(parameter.shape, generator=generator)[first : first + rows.shape[0]]
    assert run.budget is not None
    return run.budget.measure()


def test_damage_at_several_ranks(home: Path) -> None:
    """Five windows are three micro-batches: of two ranks one has none in the second round."""
    expected = damage(home, {})
    for shard in ("replicate", "full"):
        for found in run_ranks(2, damage, home, {"shard": shard}):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), shard
