"""Weights that a method begins with, at several ranks: the same as at one, to the bit."""

import sys
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from test_other_loops import METHODS, words

import train
from unlearn.model import load_model

pytestmark = pytest.mark.usefixtures("token_cache")


def trained(home: Path, folder: Path, *more: str) -> dict[str, dict[str, torch.Tensor]]:
    """Of each method, the weights that a run of two micro-batches a step ends with."""
    found = {}
    for method in METHODS:
        sys.argv = ["train.py", *map(str, words(home, folder / method, method, *more))]
        train.main()
        found[method] = load_model(str(folder / method / "model")).state_dict()
    return found


def test_noise_is_the_same_at_one_and_two_ranks(home: Path, tmp_path: Path) -> None:
    (one,) = run_ranks(1, trained, home, tmp_path / "one")
    for shard in ("replicate", "full"):
        for two in run_ranks(2, trained, home, tmp_path / shard, "--shard", shard):
            for method, weights in one.items():
                for name, weight in weights.items():
                    assert torch.equal(two[method][name], weight), (shard, method, name)
