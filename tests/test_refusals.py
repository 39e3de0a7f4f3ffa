"""What a run refuses or says of its inputs: other settings of the model, damaged checkpoints, equal corpora, sizes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WIDTH, WORDS, write_corpus
from test_checkpoint import half_done  # noqa: F401
from test_commands import flags

from unlearn.assemble import assemble
from unlearn.batches import Batches
from unlearn.config import config_of, configure
from unlearn.corpus import Corpus
from unlearn.errors import UserError
from unlearn.evals.attack.config import TamperConfig
from unlearn.files import size
from unlearn.model import load_config
from unlearn.plan_config import PlanConfig
from unlearn.run.preflight import check_apart, check_disk

pytestmark = pytest.mark.usefixtures("token_cache")


@pytest.fixture
def own_model(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> list[object]:
    """The flags of a finished run of a model of its own."""
    shutil.copytree(home / "model", tmp_path / "model")
    words = flags(home, tmp_path / "run", model=tmp_path / "model")
    assert "unlearned model" in attempt(*words)
    return words


@pytest.mark.parametrize(
    ("file", "key", "value", "what"),
    [
        ("config.json", "layer_norm_eps", 1e-3, "config.json"),
        ("tokenizer_config.json", "clean_up_tokenization_spaces", True, "tokenizer"),
    ],
)
def test_other_settings_of_the_model_are_another_run(
    own_model: list[object], tmp_path: Path, attempt: Callable[..., str], file: str, key: str, value: object, what: str
) -> None:
    """Half of the steps were taken under each, or a finished run was taken for that of the new settings."""
    path = tmp_path / "model" / file
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {key: value}))
    assert f"expected the {what} that the run" in attempt(*own_model)
    path.write_text(before)
    assert "finished before" in attempt(*own_model)


@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "progress.json", "digests.json"])
def test_bits_lost_in_a_checkpoint(
    half_done: list[object],  # noqa: F811
    tmp_path: Path,
    attempt: Callable[..., str],
    name: str,
) -> None:
    """Zeros among the numbers were trained on with; a damaged index was a traceback of pickle's."""
    newest = tmp_path / "run/checkpoints/step-000003"
    (file,) = newest.glob(name)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)
    said = attempt(*half_done)
    assert "expected " in said and "whole checkpoint" in said and str(newest) in said
    shutil.rmtree(newest)
    assert "going on after step 2" in attempt(*half_done)


@pytest.mark.parametrize(
    "changes", [{"step": 400}, {"step": -1}, {"step": "3"}, {"log_bytes": -5}, {"seconds": None}, {"extra": 3}], ids=str
)
def test_a_checkpoint_that_says_what_cannot_be(
    half_done: list[object],  # noqa: F811
    tmp_path: Path,
    attempt: Callable[..., str],
    changes: dict[str, object],
) -> None:
    """Step 400 of 3 was exported as a finished run."""
    file = tmp_path / "run/checkpoints/step-000003/progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "expected progress.json of a whole checkpoint of 3 steps or fewer" in attempt(*half_done)


def test_one_corpus_for_both(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    """Nobody said that what is forgotten and what is retained was the same text."""
    copy = shutil.copy(home / "forget.jsonl", tmp_path / "copy.jsonl")
    assert "expected --retain to be other text than --forget" in attempt(*flags(home, tmp_path / "run", retain=copy))
    mixed = write_corpus(tmp_path / "mixed.jsonl", WORDS[6:], seed=2)
    mixed.write_text(mixed.read_text() + (home / "forget.jsonl").read_text().splitlines()[0] + "\n")
    said = attempt(*flags(home, tmp_path / "run", retain=mixed))
    assert re.search(r"warning: expected --retain to be other text .* found \d windows? of the", said)


def test_text_apart_is_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    forget, retain = (Corpus(name, 1, [np.array(ids, dtype=np.int32)]) for name, ids in (("a", [1, 2]), ("b", [1, 3])))
    check_apart({"forget": forget, "retain": retain})
    check_apart({"forget": forget})
    assert capsys.readouterr().err == ""


def test_the_base_of_an_adapter_is_a_whole_path(
    home: Path, tmp_path: Path, attempt: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was typed, it was found from one folder only, and ~ from none."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    for number, typed in enumerate(("model", "~/model")):
        attempt(*flags(home, tmp_path / str(number), model=typed))
        config = json.loads((tmp_path / str(number) / "adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(home / "model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 10**15}, "expected at most 100,000,000 windows to train on; found 15,000,000,000,000,000"),
        ({"lora_rank": 100_000}, f"--lora-rank of at most {WIDTH}, the full rank"),
        ({"eval_tasks": ("wmdp_bio", "wmdp_bio")}, "every name after --eval-tasks once; found 'wmdp_bio' twice"),
    ],
    ids=str,
)
def test_sizes_and_names_that_cannot_be_meant(home: Path, changes: dict[str, Any], said: str) -> None:
    """Lists of all windows grew until memory ended; adapters of a hundred times the full rank were trained."""
    paths = {name: str(home / name) for name in ("model", "lens")}
    paths |= {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    given: dict[str, Any] = {"layers": (1,), "seq_len": 24, "batch": 6, "examples": 15, "lora_rank": 2} | changes
    with pytest.raises(UserError, match=said):
        assemble(configure(**paths, **given), torch.device("cpu"))


def test_more_steps_of_an_attack_than_can_be() -> None:
    corpus = Corpus("c", 1, [np.arange(5, dtype=np.int32)])
    with pytest.raises(UserError, match="lower --epochs, --steps or --examples"):
        Batches(corpus, examples=1, total=10**12, batch=1, seed=0, tag="attack")


def test_a_model_deeper_than_any(home: Path, tmp_path: Path) -> None:
    """Building it took for ever."""
    config = json.loads((home / "model/config.json").read_text()) | {"num_hidden_layers": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="at most 1,000 blocks; found 1,000,000"):
        load_config(str(tmp_path))


def test_a_task_of_an_attack_twice() -> None:
    with pytest.raises(UserError, match="found 'wmdp_bio' twice"):
        config_of("next-token", TamperConfig)(model="m", output="o", forget="c", eval_tasks=("wmdp_bio", "wmdp_bio"))


@pytest.mark.parametrize("given", [{"batch": 1}, {"world_size": 10**12}, {"examples": 3}], ids=str)
def test_a_plan_refuses_what_train_refuses(given: dict[str, int]) -> None:
    """Fewer windows than ranks were planned for."""
    with pytest.raises(UserError, match="at least one window a rank"):
        PlanConfig(**given)


def test_sizes_of_small_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.0 GiB were expected, and 0.0 GiB found."""
    said = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.0 KiB", 5 * 2**19: "2.5 MiB", 2**40: "1024.0 GiB"}
    assert {count: size(count) for count in said} == said
    monkeypatch.setattr("unlearn.run.preflight.shutil.disk_usage", lambda _: type("Usage", (), {"free": 4 * 2**20}))
    with pytest.raises(UserError, match=r"expected 5\.0 MiB .* found 4\.0 MiB"):
        check_disk(tmp_path, checkpoint=2**20, count=2, export=3 * 2**20)


def test_the_checkpoints_disk_is_the_one_that_they_lie_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "scratch")

    def usage(place: Path) -> object:
        return type("Usage", (), {"free": 100 if place.name == "checkpoints" else 10})

    monkeypatch.setattr("unlearn.run.preflight.shutil.disk_usage", usage)
    check_disk(tmp_path / "run", checkpoint=50, count=2, export=10)
    for sizes in ({"checkpoint": 51, "export": 0}, {"checkpoint": 1, "export": 11}):
        with pytest.raises(UserError, match="of free disk"):
            check_disk(tmp_path / "run", count=2, **sizes)
