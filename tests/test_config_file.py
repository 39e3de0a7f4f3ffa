"""`--config FILE`: a run's config.json, a TOML file, under the flags that are typed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import ROOT, flags, run

from unlearn.config import METHODS, TrainConfig, config_of, configure, parse_method_flags
from unlearn.errors import UserError
from unlearn.evals.attack.config import read_attacks
from unlearn.launch.sweep_config import read_sweep
from unlearn.run.folder import as_json

MODES = (
    {},
    {"lora_rank": 16},
    {"optimizer": "muon"},
    {"optimizer": "muon", "lora_rank": 4, "lora_targets": ("dense",)},
    {"optimizer": "muon", "muon_method": "quintic", "clip": float("inf")},
    {"optimizer": "sgd", "train": "mlp"},
    {"eval_tasks": ("wmdp_bio", "mmlu_stem"), "limit": 4, "export": False, "micro_tokens": 512},
)


def write(folder: Path, config: TrainConfig) -> Path:
    """The config.json of a run, without the run."""
    file = folder / "config.json"
    file.write_text(json.dumps(as_json(dataclasses.asdict(config))))
    return file


@pytest.mark.parametrize(
    ("method", "mode"),
    [*((name, MODES[number % 2]) for number, name in enumerate(METHODS)), *(("lens", m) for m in MODES)],
)
def test_the_flags_of_any_run_make_the_same_flags(method: str, mode: dict[str, object], tmp_path: Path) -> None:
    needed = {"teacher": "some/model"} if "teacher" in config_of(method).__dataclass_fields__ else {}
    try:
        config = configure(method, **needed, **mode)
    except UserError:
        pytest.skip("this method takes no such mode")
    found = parse_method_flags(TrainConfig, ["--config", str(write(tmp_path, config))])
    expected = dataclasses.asdict(config)
    assert dataclasses.asdict(found) == expected | {"config": str(tmp_path / "config.json")}


def test_typed_flags_replace_those_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, configure("rmu", optimizer="muon", layers=(1, 2), export=False, seed=3))
    words = ["--config", str(file), "--optimizer", "adamw", "--layers", "4", "--export", "--seed=5"]
    found = parse_method_flags(TrainConfig, words)
    assert (found.method, found.optimizer, found.layers) == ("rmu", "adamw", (4,))
    assert found.export and found.seed == 5 and found.muon_lr is None


def test_a_value_that_was_chosen_is_not_dropped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published values go with their mode; a value of the file's own does not."""
    file = write(tmp_path, configure(optimizer="muon", muon_lr=0.3))
    with pytest.raises(SystemExit):
        parse_method_flags(TrainConfig, ["--config", str(file), "--optimizer", "adamw"])
    assert "--muon-lr has no effect without --optimizer muon" in capsys.readouterr().err


def test_toml_and_lists_of_repeated_flags(tmp_path: Path) -> None:
    file = tmp_path / "attack.toml"
    file.write_text(
        """
        model = "some/model"
        forget = "attack.jsonl"
        control = ["original=some/base", "random"]
        adam_lr = 2e-5   # underscores do too
        eval-tasks = ["wmdp_bio"]
        """
    )
    found = read_attacks(["--config", str(file), "--output", "x"])
    assert (found.model, found.adam_lr, found.eval_tasks) == ("some/model", 2e-5, ("wmdp_bio",))
    assert found.control == ("original=some/base", "random")
    assert read_attacks(["--config", str(file), "--output", "x", "--control", "random"]).control == ("random",)
    assert found.run(found.subjects()[0], "attack").config is None


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.toml", "muon-lrr = 0.1", "found muon-lrr: did you mean muon-lr?"),
        ("a.toml", "[train]\nseed = 1", "found train|expected a number"),
        ("a.toml", "zzzzzz = 1", "see --help"),
        ("a.toml", "seed = ", "expected TOML in .*a.toml; found a mistake"),
        ("a.toml", "retain-coef = [{a = 1}]", "expected a number, a text"),
        ("a.json", "[1]", "expected names and values in .*; found a list"),
        ("a.json", "{", "expected JSON in"),
        ("a.json", None, "expected a readable file for --config; found .*a.json: No such file"),
    ],
)
def test_a_wrong_file_is_one_sentence(name: str, text: str | None, found: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=found):
        parse_method_flags(TrainConfig, ["--config", str(tmp_path / name)])
    with pytest.raises(UserError, match="expected one --config; found 2"):
        parse_method_flags(TrainConfig, ["--config", "a.toml", "--config=b.toml"])


def test_a_wrong_file_answers_without_torch(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("sed = 1")
    command = [sys.executable, "-X", "importtime", "train.py", "--config", str(tmp_path / "a.toml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "did you mean seed?" in result.stderr
    assert " torch\n" not in result.stderr and "Traceback" not in result.stderr


def test_a_run_starts_again_from_its_folder(home: Path, tmp_path: Path) -> None:
    """The same bits in another folder; and in its own one it is finished."""
    assert run("train.py", *flags(home, tmp_path / "a")).returncode == 0
    again = run("train.py", "--config", str(tmp_path / "a"), "--output", str(tmp_path / "b"))
    assert again.returncode == 0, again.stderr
    models = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]
    assert "finished before" in run("train.py", "--config", str(tmp_path / "a")).stdout
    plan = run("-m", "unlearn", "plan", "--config", str(tmp_path / "a"), "--world-size", "2", "--seq-len", "32")
    assert plan.returncode == 0, plan.stderr


def test_a_sweep_takes_the_files_flags_and_its_method(tmp_path: Path) -> None:
    """As words, as the file may change while the sweep runs; what the sweep and its grid set is left out."""
    file = write(tmp_path, configure("simnpo", beta=3.0, remove_coef=2.0, seed=7, output="x", lora_rank=4))
    sweep = read_sweep(
        ["--output", "s", "--grid", "remove-coef=1,3", "--target", "wmdp_bio<=0.3", "--", "--config", str(file)]
    )
    found = sweep.settings(sweep.space.points()[0], 0)
    assert (found.method, found.beta, found.lora_rank, found.seed) == ("simnpo", 3.0, 4, 0)  # type: ignore[attr-defined]
    assert not any("config" in word or word.startswith(("--output", "--seed")) for word in sweep.train_flags)
