"""What a run costs, in its log and in run.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_phases import settings

from unlearn.assemble import Unlearning, build
from unlearn.config import configure

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")


def assembled(home: Path, method: str, **flags: Any) -> Unlearning:
    retain = {} if method == "next-token" else {"retain": str(home / "retain.jsonl")}
    return build(configure(method, **settings(home, **retain, **flags)), CPU)


def tokens(run: Unlearning, corpus: str, step: int) -> int:
    """Counted in the micro-batches themselves."""
    return sum(rows.tokens for rows in run.parts.batches[corpus].micro_batches(step, CPU))


def test_one_pass_over_a_text(home: Path) -> None:
    """6 operations a token and parameter of the matrices; what checkpointing computes again is not counted."""
    run = assembled(home, "next-token")
    passes, count = run.passes(run.phases[0], 1), tokens(run, "forget", 1)
    assert passes.forward == passes.backward == count
    assert passes.flops == count * 6 * (run.shape.matrices + run.shape.head)


def test_passes_that_end_early_and_an_original(home: Path) -> None:
    """RMU at layer 2 of 4: half a pass each way, and half a pass of the original over retain text."""
    run = assembled(home, "rmu", layers=(2,))
    passes, forget, retain = run.passes(run.phases[0], 2), tokens(run, "forget", 2), tokens(run, "retain", 2)
    assert passes.forward == pytest.approx(0.5 * forget + 2 * 0.5 * retain)
    assert passes.backward == pytest.approx(0.5 * (forget + retain))


def test_a_term_without_weight_is_not_differentiated(home: Path) -> None:
    run = assembled(home, "rmu", layers=(2,), retain_start=0.0)
    first = run.passes(run.phases[0], 0)
    assert first.backward == pytest.approx(0.5 * tokens(run, "forget", 0))
    assert first.forward == pytest.approx(0.5 * tokens(run, "forget", 0) + tokens(run, "retain", 0))


def test_run_json_has_the_sum_of_the_log(
    home: Path, tmp_path: Path, attempt: Callable[..., str], run_here: Callable[..., int]
) -> None:
    words = [
        word for name, value in settings(home, retain=str(home / "retain.jsonl")).items() for word in flag(name, value)
    ]
    attempt("--method", "rmu", "--layers", "2", *words, "--output", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    cost = json.loads((tmp_path / "run/run.json").read_text())["cost"]
    run = assembled(home, "rmu", layers=(2,))
    for line in lines:  # both are something over the step's seconds, of one rank
        read = tokens(run, "forget", line["step"]) + tokens(run, "retain", line["step"])
        assert line["tflops_per_rank"] * 1e12 / line["flops"] == pytest.approx(line["tokens_per_second"] / read)
    assert len(lines) == 5
    for name in ("tokens_forward", "tokens_backward", "flops"):
        assert cost[name] == pytest.approx(sum(line[name] for line in lines)) and cost[name] > 0, name
    assert cost["seconds"] >= lines[-1]["seconds"] and cost["cpu_seconds"] > 0
    assert 0.1 < cost["peak_gib"] < 24


def flag(name: str, value: object) -> tuple[str, object]:
    return f"--{name.replace('_', '-')}", value
