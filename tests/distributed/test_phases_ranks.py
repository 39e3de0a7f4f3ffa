"""Runs with phases and hooks at several ranks, replicated and sharded: the same weights, to the bit."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import run_ranks
from test_hooks import masked, stopped
from test_phases import two_phases, words

import train
import unlearn.building
from unlearn.model import load_model

pytestmark = pytest.mark.usefixtures("token_cache")


PHASES = {"two": two_phases, "masked": masked, "stopped": stopped}


def trained(phases: str, home: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    unlearn.building.method_module = lambda name: SimpleNamespace(phases=PHASES[phases])  # type: ignore[assignment]
    sys.argv = ["train.py", *map(str, words(home, output, *more))]
    train.main()
    return load_model(str(output / "model")).state_dict()


@pytest.mark.parametrize(
    ("phases", "flags"),
    [
        ("two", ()),
        ("two", ("--lora-rank", "2")),
        ("masked", ("--train", "mlp|embed")),
        ("stopped", ("--lora-rank", "2")),
    ],
)
def test_phases_are_the_same_at_one_and_two_ranks(
    home: Path, tmp_path: Path, phases: str, flags: tuple[str, ...]
) -> None:
    more = ("--data", "mix", "--retain", str(home / "retain.jsonl"), *flags)
    (one,) = run_ranks(1, trained, phases, home, tmp_path / "one", *more)
    for shard in ("replicate", "full"):
        for two in run_ranks(2, trained, phases, home, tmp_path / shard, *more, "--shard", shard):
            for name, weight in one.items():
                assert torch.equal(two[name], weight), (shard, name)
