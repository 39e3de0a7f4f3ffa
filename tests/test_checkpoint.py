"""Going on with a run: what is refused, what is replaced, and what a finished run does when it is started again."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WORDS, tiny_model, write_corpus
from evals_support import question, write_wmdp
from test_commands import flags

import train
from unlearn.__main__ import main as unlearn_main
from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.evals import tamper
from unlearn.files import files_hash
from unlearn.run.checkpoint import Checkpoints, load, tensors
from unlearn.run.log import MetricsLog
from unlearn.run.preflight import check_disk, versions
from unlearn.run.stopping import StopSignals

pytestmark = pytest.mark.usefixtures("token_cache")


@pytest.fixture
def half_done(home: Path, tmp_path: Path, attempt: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The flags of a run that was killed in its export, after 3 steps; its corpus is its own."""
    corpus = shutil.copy(home / "forget.jsonl", tmp_path / "forget.jsonl")
    words = flags(home, tmp_path / "run", forget=corpus, **{"save-every": 1, "keep": 2})
    with monkeypatch.context() as patch:
        patch.setattr("unlearn.evals.training.finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            sys.argv[:] = ["train.py", *map(str, words)]
            train.main()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-000002", "step-000003"]
    return words


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_same_command_goes_on_at_the_export_and_then_does_nothing(
    half_done: list[object], tmp_path: Path, attempt: Callable[..., str]
) -> None:
    (tmp_path / "run/checkpoints/step-000007.tmp").mkdir()
    before = (tmp_path / "run/metrics.jsonl").read_text()
    said = attempt(*half_done)
    assert "going on after step 3 of 3" in said and "warning: " not in said
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert not (tmp_path / "run/checkpoints").exists()
    changed = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    assert "finished before" in attempt(*half_done)
    assert "finished before" in attempt(*half_done, "--overwrite", "--resume", "auto")
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == changed
    assert "found an earlier run" in attempt(*half_done, "--resume", "never")
    assert "going on" not in attempt(*half_done, "--overwrite")
    recorded = json.loads((tmp_path / "run/run.json").read_text())
    assert recorded["finished"] and len(recorded["attempts"]) == 1 and "torch" in recorded["attempts"][0]["versions"]


def test_a_finished_run_of_other_text_is_not_taken_for_this_one(
    half_done: list[object], tmp_path: Path, attempt: Callable[..., str]
) -> None:
    """The flags are the same, the corpus behind one of them is not."""
    attempt(*half_done)
    write_corpus(tmp_path / "forget.jsonl", WORDS[:6], seed=3)
    assert "expected the forget corpus that the run" in attempt(*half_done)
    assert (tmp_path / "run/model/model.safetensors").is_file(), "a refusal changes nothing"
    assert "finished before" not in attempt(*half_done, "--overwrite", "--resume", "auto")
    assert "finished before" in attempt(*half_done)


def test_another_run_is_refused_by_naming_the_difference(
    half_done: list[object], home: Path, tmp_path: Path, attempt: Callable[..., str]
) -> None:
    assert "--seed 0, not 1" in attempt(*half_done, "--seed", 1)
    assert "--forget-loss uniform, not sampled" in attempt(*half_done, "--forget-loss", "sampled")
    assert f"--retain {home / 'retain.jsonl'}, not {home}" in attempt(*half_done, "--retain", home / "forget.jsonl")
    write_corpus(tmp_path / "forget.jsonl", WORDS[:6], seed=3)
    assert "expected the forget corpus that the run" in attempt(*half_done)
    assert (tmp_path / "run/checkpoints/step-000003").is_dir(), "a refusal changes nothing"
    assert "going on" not in attempt(*half_done, "--overwrite", "--resume", "auto")


def test_a_layout_may_change(half_done: list[object], attempt: Callable[..., str]) -> None:
    assert "going on after step 3" in attempt(*half_done, "--micro-batch", 2, "--shard", "full")


def test_other_code_and_versions_are_warned_of(
    half_done: list[object], attempt: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unlearn.run.run.code_hash", lambda: "f" * 64)
    monkeypatch.setattr("unlearn.run.run.versions", lambda: versions() | {"torch": "3.0.0"})
    monkeypatch.setattr("unlearn.run.folder.world_size", lambda: 2)
    said = attempt(*half_done)
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert (
        "code " in warning and "not ffffffffffff; ranks 1, not 2; torch 2" in warning and "not 3.0.0, as in" in warning
    )
    assert "transformers" not in warning and "going on after step 3" in said


def test_a_damaged_checkpoint_and_a_cut_log(
    half_done: list[object], tmp_path: Path, attempt: Callable[..., str]
) -> None:
    newest, log = tmp_path / "run/checkpoints/step-000003", tmp_path / "run/metrics.jsonl"
    (file,) = newest.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "delete it to go on from the one before" in attempt(*half_done)
    shutil.rmtree(newest)
    text = log.read_text()
    log.write_text(text[:20])
    assert "bytes or more" in attempt(*half_done)
    log.write_text(text)
    assert "going on after step 2" in attempt(*half_done)


def test_a_checkpoint_of_another_model_names_a_tensor(tmp_path: Path) -> None:
    models = [tiny_model(), tiny_model(hidden_size=40)]
    built = [{"adamw": torch.optim.AdamW(model.parameters())} for model in models]
    with StopSignals(tmp_path / "PREEMPTED") as stop, MetricsLog(None, 1, "test") as log:
        Checkpoints(tmp_path, models[0], built[0], log, steps=1, every=1, keep=1, stop=stop).save(1)
    load(tmp_path / "checkpoints/step-000001", models[0], built[0])
    with pytest.raises(UserError, match=r"expected model\..* of shape .* the checkpoint is of another run"):
        load(tmp_path / "checkpoints/step-000001", models[1], built[1])


def test_every_state_of_adamw_comes_back(tmp_path: Path) -> None:
    """Into an optimizer that has not made any yet, and with the same next step."""
    trained, fresh = tiny_model(seed=1), tiny_model(seed=2)
    one, two = ({"adamw": torch.optim.AdamW(model.parameters(), lr=1e-2)} for model in (trained, fresh))
    _step(trained, one)
    with StopSignals(tmp_path / "PREEMPTED") as stop, MetricsLog(None, 1, "test") as log:
        Checkpoints(tmp_path, trained, one, log, steps=9, every=1, keep=1, stop=stop).save(1)
    load(tmp_path / "checkpoints/step-000001", fresh, two)
    for model, built in ((trained, one), (fresh, two)):
        _step(model, built)
    expected, found = dict(tensors(trained, one)), dict(tensors(fresh, two))
    assert len(expected) == 4 * len(list(trained.parameters())) and expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def _step(model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    model(torch.arange(12).reshape(2, 6)).logits.square().mean().backward()
    optimizers["adamw"].step()
    optimizers["adamw"].zero_grad()


def test_too_small_a_disk_and_other_weights(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UserError, match=r"expected .* GiB of free disk"):
        check_disk(tmp_path / "run", checkpoint=2**60, count=2, export=0)
    check_disk(tmp_path / "run", checkpoint=2**10, count=2, export=2**10)
    file = tmp_path / "model.safetensors"
    file.write_bytes((home / "model/model.safetensors").read_bytes())
    before = files_hash([file])
    with file.open("r+b") as stream:
        stream.seek(-5, 2)
        stream.write(b"\x01")
    assert files_hash([file]) != before


@pytest.mark.parametrize(
    "given", [{"save_every": -1}, {"keep": 0}, {"step_timeout": 0.0}, {"save_every": 0, "keep": 2}], ids=str
)
def test_flags_out_of_range(given: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--keep"):
        configure(**given)


def _call(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], words: list[object]) -> None:
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    main()


def test_an_attack_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wmdp(tmp_path / "data", [question(index, answer=index % 4, said=None) for index in range(6)])
    words = ["tamper.py", "--model", home / "model", "--forget", home / "forget.jsonl", "--data-dir", tmp_path / "data"]
    words += "--batch 4 --examples 15 --seq-len 24 --eval-every 1 --eval-tasks wmdp_bio --adam-lr 1e-3 --export".split()
    _call(monkeypatch, tamper.main, [*words, "--output", tmp_path / "whole"])
    _interrupted(monkeypatch, tamper.main, [*words, "--output", tmp_path / "killed"])
    assert (tmp_path / "killed/attacks/unlearned/attack/checkpoints/step-000002").is_dir()
    _call(monkeypatch, tamper.main, [*words, "--output", tmp_path / "killed"])
    whole, again = (json.loads((tmp_path / name / "attack.json").read_text()) for name in ("whole", "killed"))
    assert whole["points"] == again["points"] and len(again["points"]) == 5
    one, two = (
        (tmp_path / name / "attacks/unlearned/attack/model/model.safetensors").read_bytes()
        for name in ("whole", "killed")
    )
    assert one == two


def test_the_fitting_of_a_lens_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["unlearn", "fit-lens", "--model", home / "model", "--forget", home / "forget.jsonl"]
    words += ["--retain", home / "retain.jsonl", *"--steps 4 --seq-len 24 --micro-batch 16 --dtype fp32".split()]
    _call(monkeypatch, unlearn_main, [*words, "--output", tmp_path / "whole"])
    _interrupted(monkeypatch, unlearn_main, [*words, "--output", tmp_path / "killed"])
    assert not (tmp_path / "killed/config.json").exists(), "half a lens is none"
    _call(monkeypatch, unlearn_main, [*words, "--output", tmp_path / "killed"])
    for name in ("params.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(json.loads((tmp_path / "killed/fitting/run.json").read_text())["attempts"]) == 2
    _call(monkeypatch, unlearn_main, [*words, "--output", tmp_path / "killed"])
    with pytest.raises(UserError, match="--steps 4, not 5"):
        _call(monkeypatch, unlearn_main, [*words, "--output", tmp_path / "killed", "--steps", 5])


def _interrupted(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], words: list[object]) -> None:
    """Run a command that is killed after its second step, once that is saved."""

    def after(self: Checkpoints, step: int) -> None:
        self.save(step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "after", after)
        _call(patch, main, words)
