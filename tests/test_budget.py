"""--stop-at: a run ends at a budget of damage."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_filters import assembled, words
from test_phases import weights
from torch.nn.functional import cross_entropy

from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.model import load_model

pytestmark = pytest.mark.usefixtures("token_cache")
SIZES = {"examples": 8, "batch": 4, "epochs": 4, "stop_windows": 5}


def run_words(home: Path, output: Path, *budgets: str) -> list[object]:
    sizes = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
    return words(home, output, *sizes, "--stop-at", *budgets)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_damage_of_a_naive_twin(home: Path, lora_rank: int) -> None:
    """On windows that are not trained on; 0 before anything has changed."""
    run = assembled(home, stop_at=("kl=0.5", "loss=0.5"), lora_rank=lora_rank, **SIZES)
    budget, retain = run.budget, run.parts.batches["retain"]
    assert budget is not None
    assert budget.measure() == pytest.approx({"held_out_kl": 0.0, "held_out_loss": 0.0}, abs=1e-6)
    held_out = {window.tobytes() for window in budget.held_out.corpus.windows}
    assert len(held_out) == 5 and held_out.isdisjoint(retain.corpus.windows[index].tobytes() for index in retain.order)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    original, kls, losses = load_model(str(home / "model")).double(), [], []
    twin = copy.deepcopy(run.model).double().eval()
    with torch.no_grad():
        for window in budget.held_out.corpus.windows:
            ids = torch.tensor(window)[None].long()
            one, other = (model(ids).logits[0].double() for model in (original, twin))
            kls.append((one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))).sum(-1))
            pair = [cross_entropy(logits[:-1], ids[0, 1:], reduction="none") for logits in (one, other)]
            losses.append(pair[1] - pair[0])
    expected = {"held_out_kl": torch.cat(kls).mean().item(), "held_out_loss": torch.cat(losses).mean().item()}
    assert budget.measure() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert budget.measure()["held_out_kl"] > 1e-3


@pytest.mark.parametrize("killed", [None, 2])
def test_a_run_ends_where_its_budget_does(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    killed_after: Callable[..., None],
    killed: int | None,
) -> None:
    """At the first step above it, also of a run that goes on; the log has the damage of every step, and says why."""
    attempt(*run_words(home, tmp_path / "whole", "kl=50"))
    damage = [line["held_out_kl"] for line in log(tmp_path / "whole")]
    assert len(damage) == 8
    most = sum(sorted(damage)[3:5]) / 2
    last = next(step for step, value in enumerate(damage) if value > most)
    assert last > 2, "it takes a while"
    if killed is not None:
        killed_after(killed, *run_words(home, tmp_path / "run", f"kl={most}"))
    attempt(*run_words(home, tmp_path / "run", f"kl={most}"))
    lines = log(tmp_path / "run")
    assert [line["held_out_kl"] for line in lines] == damage[: last + 1]
    assert lines[-1]["stopped"].startswith(f"--stop-at kl={most:g}: 0.") and "stopped" not in lines[-2]
    cost = json.loads((tmp_path / "run/run.json").read_text())["cost"]
    assert cost["tokens_forward"] == pytest.approx(sum(line["tokens_forward"] for line in lines))
    assert weights(tmp_path / "run")


def test_a_budget_that_lasts(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    attempt(*run_words(home, tmp_path / "run", "kl=50", "loss=50"), "--stop-every", 3)
    lines = log(tmp_path / "run")
    assert len(lines) == 8 and not any("stopped" in line for line in lines)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 5]


def test_a_budget_that_is_used_up_at_once(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    """Noise may do it."""
    more = ["--stop-at", "kl=1e-9", "--stop-windows", 5, "--examples", 8, "--noise", 0.9]
    said = attempt(*("distill" if word == "grad-diff" else word for word in words(home, tmp_path / "run")), *more)
    assert "expected damage below its budget before the first step; found --stop-at kl=1e-09: " in said


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 2]])
def test_the_damage_at_the_end(home: Path, tmp_path: Path, attempt: Callable[..., str], lora: list[object]) -> None:
    """As the last look of a budget that lasts has it; without a budget nothing looks before."""
    more = ["--measure-damage", "--dtype", "fp32", *lora]
    with_budget = [*run_words(home, tmp_path / "budget", "kl=50", "loss=50"), "--stop-every", 4]
    attempt(*with_budget, *more)
    attempt(*(word for word in run_words(home, tmp_path / "run") if word != "--stop-at"), *more)
    found = [json.loads((tmp_path / name / "run.json").read_text())["damage"] for name in ("budget", "run")]
    last = next(line for line in reversed(log(tmp_path / "budget")) if "held_out_kl" in line)
    assert found[0] == found[1] == {name: last[name] for name in ("held_out_kl", "held_out_loss")}
    assert found[0]["held_out_kl"] > 0.0
    assert not any("held_out_kl" in line for line in log(tmp_path / "run"))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"stop_at": ("kl",)}, "--stop-at as NAME=NUMBER, above 0, such as kl=0.005; found 'kl'"),
    "negative": ({"stop_at": ("kl=-1",)}, "found 'kl=-1'"),
    "not a name": ({"stop_at": ("ppl=3",)}, "--stop-at kl, loss or one of --eval-tasks; found 'ppl'"),
    "twice": ({"stop_at": ("kl=1", "kl=2")}, "each budget of --stop-at once"),
    "no budget": ({"stop_every": 5}, "--stop-every has no effect without --stop-at"),
    "windows of a task": (
        {"stop_at": ("a=0.5",), "eval_tasks": ("a",), "stop_windows": 5},
        "--stop-windows has no effect without --measure-damage and --stop-at kl or loss",
    ),
    "rate alone": ({"retain_rate": 0.5}, "--retain-rate has no effect without --retain-budget"),
    "a schedule too": (
        {"retain_budget": 1.0, "retain_start": 0.5},
        "--retain-start has no effect beside --retain-budget",
    ),
    "too little text": (
        {"stop_at": ("kl=1",), "stop_windows": 120},
        "expected 120 windows of retain text .* found 112",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(home: Path, name: str) -> None:
    flags, said = MISTAKES[name]
    with pytest.raises(UserError, match=said):
        assembled(home, **flags)


def test_the_weight_of_a_retain_loss_follows_its_budget(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    killed_after: Callable[..., None],
) -> None:
    """w <- max(0, w + rate (R - budget)), from --retain-coef; a run that goes on has the weight that it had."""
    more = ("--retain-budget", 5.6, "--retain-rate", 0.5, "--retain-coef", 0.2, "--batch", 4, "--epochs", 2)
    killed_after(4, *words(home, tmp_path / "run", *more))
    for name in ("run", "whole"):
        attempt(*words(home, tmp_path / name, *more))
    lines = log(tmp_path / "run")
    weight, weights_seen = 0.2, []
    for line in lines:
        assert line["retain_weight"] == pytest.approx(weight, rel=1e-6)
        weights_seen.append(weight)
        weight = max(1e-12, weight + 0.5 * (line["retain_loss"] - 5.6))
    assert len(lines) == 10 and max(weights_seen) > 0.25, weights_seen
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_weight_that_is_not_needed_falls_to_nothing(home: Path) -> None:
    run = assembled(home, retain_budget=100.0)
    retain = run.phases[0].terms[1]
    assert retain.weight(0.0) == 1.0 and retain.hooks.stop is not None
    assert retain.hooks.stop(1, {"retain_loss": 5.0}) is None
    assert retain.weight(0.5) == 1e-12


def test_no_retain_loss_to_measure_damage_beside() -> None:
    with pytest.raises(UserError, match="a retain loss beside --measure-damage, on whose text it is measured"):
        configure("undial", measure_damage=True)
