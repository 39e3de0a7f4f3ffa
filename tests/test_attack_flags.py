"""The grid of attacks: its flags, and the windows that each attack draws."""

import math
from pathlib import Path
from typing import Any

import pytest

from evals.fetch_config import FetchConfig
from evals.fine_tuning import AttackFlags, attack_batches
from evals.tamper_config import Attack, TamperConfig
from unlearn.config import TrainConfig, parse_flags
from unlearn.data import Corpus
from unlearn.errors import UserError

BASE = {"model": "m", "output": "o", "corpus": "c"}
GRID = {"data": ("forget", "mix"), "benign_corpus": "b"}


def test_the_grid_is_the_product_of_its_flags() -> None:
    config = TamperConfig(**BASE, **GRID, lr=(1e-5, 1e-4), lora_rank=(0, 8), schedule=("constant", "cosine"))
    attacks = config.attacks()
    assert len(attacks) == len({one.name for one in attacks}) == 16
    assert attacks[0] == Attack(0, 1e-5, "constant", 0.0, "forget", 512)
    assert attacks[-1].name == "lora8-lr0.0001-cosine-mix-512"
    flags = [AttackFlags.of(config, config.subjects()[0], one) for one in attacks]
    assert {one.lora_alpha for one in flags if one.lora_rank} == {16.0}
    assert {one.lora_alpha for one in flags if not one.lora_rank} == {None}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lr": (1e-5, 1e-5)}, "expected different values after --lr; found 1e-05 twice"),
        ({"lr": ()}, "at least one value after --lr"),
        ({"lr": (0.0,)}, "--lr to be above 0"),
        ({"lr": (math.nan,)}, "--lr to be above 0"),
        ({"warmup_ratio": (1.0,)}, r"--warmup-ratio to be in \[0, 1\)"),
        ({"examples": (8, 0)}, "--examples to be 1 or more; found 0"),
        ({"examples": (1, 8), **GRID}, "--examples of 2 or more for --data mix"),
        ({"benign_corpus": "b"}, "--benign-corpus has no effect with --data forget"),
        ({"data": ("benign",), "benign_corpus": "b"}, "--corpus has no effect with --data benign"),
        ({"data": ("mix",)}, "expected --benign-corpus for --data mix; found none"),
        ({"corpus": None}, "expected --corpus, the attack text"),
        ({"lora_alpha": 8.0}, "--lora-alpha has no effect with --lora-rank 0"),
        ({"lora_targets": ("dense",)}, "--lora-targets has no effect with --lora-rank 0"),
        ({"steps": 5, "epochs": 2}, "--epochs has no effect beside --steps"),
        ({"shard_size": 2}, "--shard-size has no effect without --shard hybrid"),
        ({"general_drop": 0.1, "general_floor": 0.3}, "--general-drop has no effect beside --general-floor"),
        ({"general_drop": 0.1, "eval_tasks": ("wmdp_bio",)}, "--general-drop has no effect without a general task"),
        ({"general_tasks": ("wmdp_chem",)}, "expected --general-tasks among --eval-tasks; found 'wmdp_chem'"),
        ({"general_tasks": ("wmdp_bio",)}, "found 'wmdp_bio' as both"),
        ({"control": ("original",)}, "expected --control as NAME=MODEL, or random; found 'original'"),
        ({"control": ("random=x",)}, "expected --control as NAME=MODEL, or random; found 'random=x'"),
        ({"control": ("../a=x",)}, "expected --control as NAME=MODEL"),
        ({"control": ("a=x", "a=y")}, "found 'a' twice"),
        ({"control": ("unlearned=x",)}, "found 'unlearned' twice"),
        ({"control": ("original=x",), "reference": "y"}, "--reference has no effect beside --control original"),
        ({"save_model": True, "lr": (1e-5, 1e-4)}, "expected a single attack for --save-model; found 2"),
        ({"save_model": True, "control": ("random",)}, "expected a single attack for --save-model"),
        ({"limit": 3, "eval_subsample": 3}, "--limit has no effect beside --eval-subsample"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_meant(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TamperConfig(**(BASE | flags))


def test_tasks_with_commas_between_are_several() -> None:
    """Joined names passed as one: no task had a part in the attack, and one named twice was not noticed."""
    config = TamperConfig(**(BASE | {"eval_tasks": ("wmdp_bio,mmlu_stem", "own"), "general_tasks": ("own,mmlu_stem",)}))
    assert config.eval_tasks == ("wmdp_bio", "mmlu_stem", "own")
    assert config.roles() == (["wmdp_bio"], ["own", "mmlu_stem"])
    with pytest.raises(UserError, match="every name after --eval-tasks once; found 'a' twice"):
        TamperConfig(**(BASE | {"eval_tasks": ("a,b", "a")}))
    assert TrainConfig(eval_tasks=("a,b", "c")).eval_tasks == ("a", "b", "c")
    with pytest.raises(UserError, match="every name after --eval-tasks once; found 'a' twice"):
        TrainConfig(eval_tasks=("a,b", "a"))
    assert FetchConfig(data_dir=Path("x"), tasks=("wmdp_bio,mmlu",)).tasks == ("wmdp_bio", "mmlu")


def test_several_values_on_the_command_line() -> None:
    line = "--model m --output o --corpus c --lr 2e-5 1e-4 --schedule linear constant --lora-rank 0 16 --examples 8 512"
    config = parse_flags(TamperConfig, [*line.split(), "--control", "random", "--control", "original=a/b"])
    assert len(config.attacks()) == 16
    assert [(one.name, one.model, one.random) for one in config.subjects()] == [
        ("unlearned", "m", False),
        ("random", "m", True),
        ("original", "a/b", False),
    ]


def corpora(forget: int = 30, benign: int = 20) -> dict[str, Corpus]:
    import numpy as np

    return {
        name: Corpus(name, count, [np.arange(first + i, first + i + 5, dtype=np.int32) for i in range(count)])
        for name, count, first in (("forget", forget, 0), ("benign", benign, 1000))
    }


def batches_of(found: dict[str, Corpus], **flags: Any) -> Any:
    config = TamperConfig(**(BASE | {"batch": 4} | flags))
    return attack_batches(AttackFlags.of(config, config.subjects()[0], config.attacks()[0]), found)


def test_a_mix_is_half_of_either_text() -> None:
    found = batches_of(corpora(), data=("mix",), benign_corpus="b", examples=(16,))
    first = [int(found.corpus.windows[index][0]) for index in found.order]
    assert sum(token < 1000 for token in first) == sum(token >= 1000 for token in first) == 8
    alone = batches_of(corpora(), examples=(8,))
    assert {token for token in first if token < 1000} == {int(alone.corpus.windows[i][0]) for i in alone.order}
    assert len({token >= 1000 for token in first[:4]} | {token >= 1000 for token in first[4:8]}) == 2
    scarce = batches_of(corpora(benign=3), data=("mix",), benign_corpus="b", examples=(16,))
    assert scarce.unique == 6


def test_few_shot_takes_as_many_passes_as_steps_need() -> None:
    few = batches_of(corpora(), examples=(3,), steps=10, batch=16)
    assert (few.unique, few.batch, few.steps, few.total) == (3, 3, 10, 30)
    assert all(len(set(few.indices(step))) == 3 for step in range(10)), "no window twice in a step"
    passes = batches_of(corpora(), examples=(8,), epochs=3)
    assert (passes.steps, passes.total) == (6, 24)
