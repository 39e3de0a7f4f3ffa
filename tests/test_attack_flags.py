"""The grid of attacks: its flags, and the windows that each attack draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_tokenizer, write_corpus

from unlearn.assemble import Corpora, mixed
from unlearn.batches import Batches
from unlearn.config import TrainConfig, config_of, configure
from unlearn.corpus import Corpus
from unlearn.errors import UserError
from unlearn.evals.attack.config import METHOD, TamperConfig, read_attacks
from unlearn.evals.fetch_config import FetchConfig

BASE = {"model": "m", "output": "o", "forget": "c"}
GRID = {"grid": ("data=forget,mix",), "retain": "b"}


def tamper(**flags: Any) -> TamperConfig:
    return config_of(METHOD, TamperConfig)(**(BASE | flags))  # type: ignore[return-value]


def test_the_grid_is_the_product_of_its_flags() -> None:
    grid = ("data=forget,mix", "adam-lr=1e-5,1e-4", "lora-rank=0,8", "schedule=constant,cosine")
    config = tamper(grid=grid, retain="b", lora_alpha=8.0)
    assert len(config.attacks) == 16
    assert list(config.attacks)[0] == "data=forget+adam-lr=1e-5+lora-rank=0+schedule=constant"
    runs = [config.run(config.subjects()[0], name) for name in config.attacks]
    assert runs[-1] == configure(
        METHOD,
        model="m",
        output="attack",
        resume="auto",
        forget="c",
        retain="b",
        data="mix",
        adam_lr=1e-4,
        lora_rank=8,
        lora_alpha=8.0,
        schedule="cosine",
        eval_tasks=("wmdp_bio", "mmlu_stem"),
        eval_every=10,
        export=False,
    )
    assert {one.lora_alpha for one in runs if not one.lora_rank} == {None}, "left out where it has no effect"
    assert {one.adam_lr for one in runs} == {1e-5, 1e-4} and {one.batch for one in runs} == {16}


def test_an_attack_may_be_of_any_kind() -> None:
    config = tamper(optimizer="muon", grid=("muon-lr=1e-4,1e-3",), clip=float("inf"))
    assert [config.run(config.subjects()[0], name).muon_lr for name in config.attacks] == [1e-4, 1e-3]
    other = read_attacks("--model m --output o --forget c --retain r --method rmu --layers 3".split())
    (name,) = other.attacks
    assert name == "attack" and other.run(other.subjects()[0], name).method == "rmu"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"grid": ("adam-lr=1e-5,1e-5",)}, "expected every flag and value of --grid once"),
        ({"grid": ("adam-lr=",)}, "expected --grid as FLAG=VALUE,VALUE"),
        ({"grid": ("adam-lr=x",)}, "expected values of --adam-lr as train.py takes them"),
        ({"grid": ("adam-lr=0.0,1",)}, "found --adam-lr 0.0 refused: expected --adam-lr to be"),
        ({"grid": ("model=a,b",)}, "the attack sets that one itself"),
        ({"grid": ("nothing=1,2",)}, "expected flags of train.py in --grid; found 'nothing'"),
        ({"grid": ("seq-len=8,16",)}, "expected one --seq-len for all attacks"),
        ({"grid": ("adam-lr=1e-5,1e-4",), "adam_lr": 1e-3}, "expected each flag in one place; found --adam-lr"),
        ({"adam_lr": 0.0}, "expected --adam-lr to be"),
        ({"warmup_ratio": 1.0}, "expected --warmup-ratio to be"),
        ({"grid": ("examples=1,8",), "data": "mix", "retain": "b"}, "--examples of 2 or more for --data mix"),
        ({"retain": "b"}, "--retain has no effect with --data forget"),
        ({"retain": "b", "grid": ("adam-lr=1e-5,1e-4",)}, "--retain has no effect at any point of --grid"),
        ({"data": "retain", "retain": "b"}, "--forget has no effect with --data retain"),
        ({"data": "mix"}, "expected --retain, harmless text that this attack trains on"),
        ({"repair_steps": 4, "steps": 3, "retain": "b"}, "--repair-steps of at most --steps"),
        ({"repair_steps": 4}, "expected --retain, harmless text that this attack trains on"),
        (
            {"repair_steps": 4, "data": "retain", "retain": "b", "forget": ""},
            "--repair-steps has no effect with --data retain",
        ),
        ({"grid": ("data=forget,mix",)}, "expected --retain, harmless text that this attack trains on"),
        ({"forget": ""}, "expected --forget, the attack text"),
        ({"lora_alpha": 8.0}, "--lora-alpha has no effect without --lora-rank"),
        ({"lora_targets": ("dense",)}, "--lora-targets has no effect without --lora-rank"),
        ({"steps": 5, "epochs": 2}, "--epochs has no effect beside --steps"),
        ({"shard_size": 2}, "--shard-size has no effect without --shard hybrid"),
        ({"general_drop": 0.1, "general_floor": 0.3}, "--general-drop has no effect beside --general-floor"),
        ({"general_drop": 1.1}, r"--general-drop to be in \[0, 1\]"),
        ({"general_drop": 0.1, "eval_tasks": ("wmdp_bio",)}, "--general-drop has no effect without a general task"),
        ({"general_tasks": ("wmdp_chem",)}, "expected --general-tasks among --eval-tasks; found 'wmdp_chem'"),
        ({"general_tasks": ("wmdp_bio",)}, "found 'wmdp_bio' as both"),
        ({"control": ("original",)}, "expected --control as NAME=MODEL, or random; found 'original'"),
        ({"control": ("random=x",)}, "expected --control as NAME=MODEL, or random; found 'random=x'"),
        ({"control": ("../a=x",)}, "expected --control as NAME=MODEL"),
        ({"control": ("a=x", "a=y")}, "found 'a' twice"),
        ({"control": ("unlearned=x",)}, "found 'unlearned' twice"),
        ({"control": ("original=x",), "reference": "y"}, "--reference has no effect beside --control original"),
        ({"stop_at": ("wmdp_bio=0.3",)}, "--stop-at has no effect on an attack"),
        ({"limit": 3, "eval_subsample": 3}, "--limit has no effect beside --eval-subsample"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_meant(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tamper(**flags)


def test_tasks_with_commas_between_are_several() -> None:
    """Joined names passed as one: no task had a part in the attack, and one named twice was not noticed."""
    config = tamper(eval_tasks=("wmdp_bio,mmlu_stem", "own"), general_tasks=("own,mmlu_stem",))
    assert config.eval_tasks == ("wmdp_bio", "mmlu_stem", "own")
    assert config.roles() == (["wmdp_bio"], ["own", "mmlu_stem"])
    with pytest.raises(UserError, match="every name after --eval-tasks once; found 'a' twice"):
        tamper(eval_tasks=("a,b", "a"))
    assert TrainConfig(eval_tasks=("a,b", "c")).eval_tasks == ("a", "b", "c")
    with pytest.raises(UserError, match="every name after --eval-tasks once; found 'a' twice"):
        TrainConfig(eval_tasks=("a,b", "a"))
    assert FetchConfig(data_dir=Path("x"), tasks=("wmdp_bio,mmlu",)).tasks == ("wmdp_bio", "mmlu")


def test_a_grid_on_the_command_line() -> None:
    line = "--model m --output o --forget c --grid adam-lr=2e-5,1e-4 schedule=linear,constant lora-rank=0,16"
    config = read_attacks([*line.split(), "examples=8,512", "--control", "random", "--control", "original=a/b"])
    assert len(config.attacks) == 16
    assert [(one.name, one.model, one.random) for one in config.subjects()] == [
        ("unlearned", "m", False),
        ("random", "m", True),
        ("original", "a/b", False),
    ]
    assert config.run(config.subjects()[1], next(iter(config.attacks))).fresh_weights


def corpora(forget: int = 30, retain: int = 20) -> dict[str, Corpus]:
    return {
        name: Corpus(name, count, [np.arange(first + i, first + i + 5, dtype=np.int32) for i in range(count)])
        for name, count, first in (("forget", forget, 0), ("retain", retain, 1000))
    }


class Read(Corpora):
    """Of corpora that are read already."""

    def __init__(self, found: dict[str, Corpus], **flags: Any):
        super().__init__(configure(METHOD, **flags), tiny_tokenizer())
        self.found = found

    def _read(self, name: str) -> Corpus:
        return super()._read(name) if name == "mix" else self.found[name]


def batches_of(found: dict[str, Corpus], **flags: Any) -> Batches:
    return Read(found, **({"batch": 4} | flags))[flags.get("data", "forget")]


@pytest.mark.parametrize("tasks", [("wmdp_bio", "mmlu_stem"), ("mmlu_stem", "wmdp_bio")])
def test_a_grid_takes_the_flags_of_its_measurements(tasks: tuple[str, ...]) -> None:
    """Also where --eval-tasks has its default's value, which is no reason to think that nothing is measured."""
    words = ["--model", "x", "--output", "y", "--forget", "z.jsonl", "--grid", "adam-lr=1e-4,1e-3"]
    found = read_attacks([*words, "--eval-tasks", *tasks, "--eval-subsample", "40"])
    assert all(found.run(found.subjects()[0], name).eval_subsample == 40 for name in found.attacks)


def test_a_mix_is_half_of_either_text() -> None:
    found = batches_of(corpora(), data="mix", examples=16)
    first = [int(found.corpus.windows[index][0]) for index in found.order]
    assert sum(token < 1000 for token in first) == sum(token >= 1000 for token in first) == 8
    alone = batches_of(corpora(), examples=8)
    assert {token for token in first if token < 1000} == {int(alone.corpus.windows[i][0]) for i in alone.order}
    assert len({token >= 1000 for token in first[:4]} | {token >= 1000 for token in first[4:8]}) == 2
    assert batches_of(corpora(retain=3), data="mix", examples=16).unique == 6
    assert len(mixed(corpora(), 7, 0).windows) == 6


def test_few_shot_takes_as_many_passes_as_steps_need() -> None:
    few = batches_of(corpora(), examples=3, steps=10, batch=16)
    assert (few.unique, few.batch, few.steps, few.total) == (3, 3, 10, 30)
    assert all(len(set(few.indices(step))) == 3 for step in range(10)), "no window twice in a step"
    passes = batches_of(corpora(), examples=8, epochs=3)
    assert (passes.steps, passes.total) == (6, 24)


def test_a_later_corpus_has_as_many_steps_as_the_first(tmp_path: Path) -> None:
    words = [f"word{index}" for index in range(40)]
    files = [str(write_corpus(tmp_path / f"{name}.jsonl", words, seed=seed)) for seed, name in enumerate("ab")]
    config = configure("rmu", forget=files[0], retain=files[1], layers=(1,), examples=3, batch=16, steps=7)
    found = Corpora(config, tiny_tokenizer())
    assert {(found[name].steps, found[name].batch) for name in ("forget", "retain")} == {(7, 3)}
