"""`unlearn export`: a stopped run's model from a checkpoint, to the bit as the run itself would have written it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_model, tiny_tokenizer
from test_commands import ROOT, flags, run
from transformers import AutoModelForCausalLM

import train
from unlearn.__main__ import main as unlearn_main
from unlearn.evals import training
from unlearn.model import save_model

pytestmark = pytest.mark.usefixtures("token_cache")

KINDS: dict[str, dict[str, object]] = {
    "lora-adamw": {},
    "lora-muon": {"optimizer": "muon"},
    "lora-bf16": {"dtype": "bf16", "lora-targets": "query_key_value", "lora-layers": "1 2"},
    "full-adamw": {"lora-rank": None},
    "full-muon": {"lora-rank": None, "optimizer": "muon", "dtype": "bf16"},
    "a-part": {"lora-rank": None, "train": "mlp"},
    "fresh": {"fresh-weights": ""},
}
DRIVER = """
import shutil, sys
import train
from unlearn.distributed import barrier, is_main
from unlearn.evals import training

finish = training.finish

def finish_after_copying(run, folder):
    if is_main():
        shutil.copytree(folder, f"{folder}-stopped")
    barrier()
    finish(run, folder)

training.finish = finish_after_copying
train.main()
"""


@pytest.fixture
def stopped(
    home: Path, tmp_path: Path, run_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Path]]:
    """Make a run, and a copy of it as it stood before its export; return both folders."""

    def make(**changes: object) -> tuple[Path, Path]:
        finish = training.finish

        def after_copying(unlearning: object, folder: Path) -> None:
            shutil.copytree(folder, tmp_path / "stopped", ignore=shutil.ignore_patterns("lock"))
            finish(unlearning, folder)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(training, "finish", after_copying)
            words = flags(home, tmp_path / "run", **({"save-every": 2, "keep": 2} | changes))
            assert run_here(train.main, *words) == 0
        return tmp_path / "run", tmp_path / "stopped"

    return make


@pytest.fixture
def export(run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command; return its exit code and what it said."""

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = run_here(unlearn_main, "export", *words)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check_same(one: Path, other: Path) -> None:
    """model/ and adapter/ are the same files, byte for byte."""
    for part in ("model", "adapter"):
        expected, found = contents(one / part), contents(other / part)
        assert expected.keys() == found.keys()
        assert [name for name in expected if expected[name] != found[name]] == []
    assert "model.safetensors" in contents(one / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_the_run_itself(
    stopped: Callable[..., tuple[Path, Path]], export: Callable[..., tuple[int, str]], kind: str
) -> None:
    whole, half = stopped(**KINDS[kind])
    before = contents(half)
    code, said = export(half)
    output = half.with_name("stopped-step-000003")
    assert code == 0 and f"model after 3 steps: {output / 'model'}" in said and "warning" not in said, said
    assert contents(half) == before, "the run's folder is as it was"
    check_same(whole, output)
    assert (output / "adapter").exists() == kind.startswith(("lora", "fresh"))
    AutoModelForCausalLM.from_pretrained(output / "model")
    origin = json.loads((output / "export.json").read_text())
    assert (origin["run"], origin["step"]) == ("stopped", 3) and origin["identity"].keys() >= {"model", "tokenizer"}


def test_an_earlier_step_and_then_the_run_goes_on(
    stopped: Callable[..., tuple[Path, Path]],
    killed_after: Callable[..., None],
    attempt: Callable[..., str],
    export: Callable[..., tuple[int, str]],
    home: Path,
    tmp_path: Path,
) -> None:
    """Exported after step 2 of 3, another model than the last; going on ends in the bits of an undisturbed run."""
    whole, half = stopped()
    code, said = export(half, "--step", 2, "--output", tmp_path / "two")
    assert code == 0, said
    killed_after(2, *flags(home, tmp_path / "killed", **{"save-every": 2, "keep": 2}))
    code, said = export(tmp_path / "killed", "--output", tmp_path / "killed/model-step-000002")
    assert code == 0, said
    check_same(tmp_path / "two", tmp_path / "killed/model-step-000002")
    early, late = (place / "model/model.safetensors" for place in (tmp_path / "two", whole))
    assert early.read_bytes() != late.read_bytes()
    assert "going on after step 2 of 3" in attempt(*flags(home, tmp_path / "killed", **{"save-every": 2, "keep": 2}))
    check_same(whole, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora-adamw", "full-muon"])
def test_a_checkpoint_of_two_ranks(
    home: Path, tmp_path: Path, export: Callable[..., tuple[int, str]], kind: str
) -> None:
    """Sharded over two ranks, exported by one process."""
    (tmp_path / "driver.py").write_text(DRIVER)
    words = flags(home, tmp_path / "run", **(KINDS[kind] | {"shard": "full", "save-every": 2}))
    result = run(tmp_path / "driver.py", *words, ranks=2, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / "run-stopped/lock", ignore_errors=True)
    (tmp_path / "run-stopped/lock").unlink(missing_ok=True)
    assert json.loads((tmp_path / "run-stopped/checkpoints/step-000003/progress.json").read_text())["world_size"] == 2
    code, said = export(tmp_path / "run-stopped", "--output", tmp_path / "one")
    assert code == 0, said
    check_same(tmp_path / "run", tmp_path / "one")


def test_without_corpora_and_with_a_model_that_has_moved(
    home: Path, tmp_path: Path, killed_after: Callable[..., None], export: Callable[..., tuple[int, str]]
) -> None:
    """Nothing but the model is read; another one of the same shape is refused."""
    base = Path(shutil.copytree(home / "model", tmp_path / "base"))
    texts = {name: shutil.copy(home / f"{name}.jsonl", tmp_path) for name in ("forget", "retain")}
    killed_after(2, *flags(home, tmp_path / "run", model=base, **texts, **{"save-every": 1}))
    for text in texts.values():
        Path(text).unlink()
    assert export(tmp_path / "run", "--output", tmp_path / "one")[0] == 0
    base.rename(tmp_path / "moved")
    code, said = export(tmp_path / "run", "--output", tmp_path / "two")
    assert code == 2 and "found nothing at" in said and "give --model where it has moved" in said
    assert export(tmp_path / "run", "--output", tmp_path / "two", "--model", tmp_path / "moved")[0] == 0
    names = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("one", "two")]
    assert names[0] == names[1]
    save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "other")
    code, said = export(tmp_path / "run", "--output", tmp_path / "three", "--model", tmp_path / "other")
    assert code == 2 and "expected the model that the run began with" in said
    assert not (tmp_path / "three").exists()


def test_what_is_no_stopped_run(
    stopped: Callable[..., tuple[Path, Path]], home: Path, tmp_path: Path, export: Callable[..., tuple[int, str]]
) -> None:
    """Each mistake in a sentence, and nothing is written."""
    whole, half = stopped()
    damaged = Path(shutil.copytree(half, tmp_path / "damaged"))
    (file,) = (damaged / "checkpoints/step-000003").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-7])
    torn = Path(shutil.copytree(half, tmp_path / "torn"))
    (torn / "run.json").write_text('{"identity": ')
    fresh = Path(shutil.copytree(half, tmp_path / "new"))
    shutil.rmtree(fresh / "checkpoints")
    lens = Path(shutil.copytree(half, tmp_path / "lens-run"))
    stored = json.loads((lens / "config.json").read_text())
    (lens / "config.json").write_text(json.dumps({key: stored[key] for key in ("model", "seed")}))
    for words, expected in [
        ((tmp_path / "nowhere",), "found nothing at"),
        ((home,), "no readable config.json"),
        ((torn,), "no readable run.json"),
        ((whole,), "found a finished run, which keeps none"),
        ((fresh,), "found no whole one"),
        ((lens,), "expected a run of train.py"),
        ((damaged,), "expected a whole checkpoint"),
        ((half, "--step", 1), "expected --step among 2, 3"),
        ((half, "--step", 0), "expected --step to be 1 or more"),
        ((half, "--output", half), "--output"),
        ((half, "--output", home), "expected"),
    ]:
        code, said = export(*words)
        assert code == 2 and expected in said and "Traceback" not in said, (words, said)
    assert not list(tmp_path.glob("*-step-*"))
    assert export(half)[0] == 0
    code, said = export(half)
    assert code == 2 and "give --overwrite" in said
    assert export(half, "--overwrite", "--step", 2)[0] == 0
    assert json.loads((tmp_path / "stopped-step-000003/export.json").read_text())["step"] == 3
    assert json.loads((tmp_path / "stopped-step-000002/export.json").read_text())["step"] == 2


def test_a_run_at_work_is_left_alone(
    stopped: Callable[..., tuple[Path, Path]], export: Callable[..., tuple[int, str]]
) -> None:
    from unlearn.run.run import at_work

    _, half = stopped()
    with at_work(half):
        code, said = export(half)
        assert code == 2 and "expected no run at work" in said
        assert (half / "lock").exists()
    assert export(half)[0] == 0 and not (half / "lock").exists()
