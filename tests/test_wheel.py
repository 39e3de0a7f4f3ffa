"""The package as `pip install unlearn` gives it: in an environment of its own, far from the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = "--steps 2 --batch 4 --examples 8 --micro-batch 4 --seq-len 48 --lora-rank 2 --dtype fp32 --retain-loss kl"


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a build/ where it builds
    shutil.copytree(ROOT / "unlearn", source / "unlearn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel alone. Its dependencies are read where they already
    are, without the links that an editable installation of this project has left there."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert run(folder / "bin/python", "-c", "import unlearn; print(unlearn.__file__)", cwd=folder).startswith(str(site))
    return folder / "bin"


def test_uv_and_pip_are_told_the_same_versions() -> None:
    """And the lock has them, from the public index alone."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    assert project["tool"]["uv"]["constraint-dependencies"] == pins
    locked = {package["name"].lower(): package for package in lock["package"]}
    for pin in pins:
        name, version = pin.split("==")
        package = locked.get(name.lower().replace("_", "-"))
        assert (package is None and name == "tuned-lens") or package["version"] == version, pin
    assert {package["source"].get("registry", "https://pypi.org/simple") for package in locked.values()} == {
        "https://pypi.org/simple"
    }
    asked = {word.partition(">")[0].lower() for word in project["project"]["dependencies"]}
    own = {one["name"] for one in locked["unlearn"]["dependencies"]}
    assert own == asked, "make a new lock: uv lock"


@pytest.mark.parametrize("recipe", ["Dockerfile", "unlearn.def"])
def test_a_container_has_what_its_recipe_copies(recipe: str) -> None:
    text = (ROOT / "launch/container" / recipe).read_text()
    named = set(re.findall(r"\b(pyproject\.toml|uv\.lock|README\.md|LICENSE|unlearn)\b(?= |$)", text, re.MULTILINE))
    assert {"pyproject.toml", "uv.lock", "README.md", "LICENSE", "unlearn"} <= named
    assert all((ROOT / name).exists() for name in named)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (command,) = re.findall(r"uv sync .*", text)
    assert "--locked" in command and set(re.findall(r"--extra (\w+)", command)) <= set(extras)


@pytest.mark.slow
def test_a_wheel_takes_one_name(wheel: Path) -> None:
    """`evals` and `launch` are names that other packages have too."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"unlearn"}
    sources = (file for file in (ROOT / "unlearn").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert {str(file.relative_to(ROOT)) for file in sources} <= set(names)


@pytest.mark.slow
def test_from_the_world_to_a_sweep_without_the_repository(installed: Path, tmp_path: Path) -> None:
    """World, training, evaluation, attack, report, and a sweep, which starts the others."""
    unlearn = installed / "unlearn"
    corpora = ["--forget", "world/corpora/forget.jsonl", "--retain", "world/corpora/retain.jsonl"]
    questions = ["--data-dir", "world/data"]
    run(unlearn, "world", "--output", "world", cwd=tmp_path)
    train = ["--method", "simnpo", "--model", "world/model", *corpora, *TRAIN.split()]
    run(unlearn, "train", *train, "--output", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run/run.json").read_text())["attempts"][-1]["command"].startswith(
        "python -m unlearn"
    )
    measure = ["--model", "run/model", "--tasks", "wmdp_bio", *questions, "--limit", "8", "--dtype", "fp32"]
    assert "wmdp_bio" in run(unlearn, "eval", *measure, cwd=tmp_path)
    attack = ["--model", "run/model", "--forget", "world/corpora/attack.jsonl", "--eval-tasks", "wmdp_bio", *questions]
    attack += ["--steps", "2", "--seq-len", "48", "--batch", "4", "--micro-batch", "4", "--dtype", "fp32"]
    run(unlearn, "attack", *attack, "--eval-subsample", "8", "--output", "attack", cwd=tmp_path)
    run(unlearn, "report", "run", cwd=tmp_path)
    assert (tmp_path / "run/report.html").is_file()
    grid = ["--grid", "remove-coef=1", "--target", "wmdp_bio<=0.9", "--target", "mmlu_stem>=0.1", "--output", "sweep"]
    run(unlearn, "sweep", *grid, *questions, "--", *train, cwd=tmp_path)
    assert (tmp_path / "sweep/table.md").is_file()
