"""README and docs: the programs take every command on them, and the pages for newcomers are walked through."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from unlearn.__main__ import HERE, flags_of_command
from unlearn.config import TrainConfig, parse_flags, parse_method_flags
from unlearn.config_file import with_file
from unlearn.evals.attack.config import read_attacks
from unlearn.evals.elicit_config import ElicitConfig
from unlearn.evals.eval_config import EvalConfig
from unlearn.evals.fetch_config import FetchConfig
from unlearn.evals.pair_config import PairConfig
from unlearn.launch.compare_config import read_comparison
from unlearn.launch.sweep_config import read_sweep

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "train.py": lambda words: parse_method_flags(TrainConfig, words),
    "evals/run.py": lambda words: parse_flags(EvalConfig, words),
    "evals/tamper.py": read_attacks,
    "evals/elicit.py": lambda words: parse_flags(ElicitConfig, words),
    "evals/fetch.py": lambda words: parse_flags(FetchConfig, words),
    "evals/pair.py": lambda words: parse_flags(PairConfig, words),
    "launch/sweep.py": read_sweep,
    "launch/compare.py": read_comparison,
}
NAMES = {"train": "train.py", "eval": "evals/run.py", "attack": "evals/tamper.py", "elicit": "evals/elicit.py"}
NAMES |= {"fetch": "evals/fetch.py", "pair": "evals/pair.py", "sweep": "launch/sweep.py"}
# What a laptop without network, and a test of minutes, cannot run: other tests do, or nobody can here.
ELSEWHERE = re.compile(r"^(make|pip|uv|docker|apptainer|sbatch|hf|source)\b|--track wandb|--repo |\b[A-Z]{4,}\b")


def commands(text: str) -> Iterator[str]:
    """The commands in the blocks of a page: continued lines joined, a here-document with its text."""
    for block in re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        lines = iter(block.replace("\\\n", " ").splitlines())
        for line in lines:
            line = line.removeprefix("$ ")
            if not re.match(r"(python|torchrun|unlearn|launch/|make|pip|uv|source|mkdir|cat >|sbatch|\.venv)", line):
                continue
            ending = re.search(r"<< '(\w+)'$", line)
            while ending and not line.endswith(f"\n{ending[1]}"):
                line += "\n" + next(lines)
            while not ending and line.partition("#")[0].count("'") % 2:  # a quotation over several lines
                line += "\n" + next(lines)
            yield line


def program(command: str) -> tuple[str, list[str]] | None:
    """(a program of this project, its words) of a command, through whatever starts it; None if there is none."""
    words = shlex.split(command, comments=True) if "<<" not in command else []
    for place, word in enumerate(words):
        if word in READERS:
            return word, words[place + 1 :]
        if word == "unlearn" and (place == 0 or words[place - 1] == "-m"):
            name, rest = (words[place + 1], words[place + 2 :]) if place + 1 < len(words) else ("--help", [])
            return (NAMES[name], rest) if name in NAMES else (name, rest)
    return None


def check(name: str, words: Sequence[str]) -> None:
    """Read a command as its program would."""
    if name in READERS:
        READERS[name](words)
    elif name in HERE:
        flags = flags_of_command(name, words)
        parse_flags(flags, with_file(words, lambda words: flags_of_command(name, words)))
    else:
        assert name.startswith("--"), f"no command of this project: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_taken(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and values; nothing is run. Flags from an earlier run, and trackers' packages, are not there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "launch/recipes", tmp_path / "launch/recipes")
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.json").write_text('{"method": "lens", "lora_rank": 16}')
    monkeypatch.setattr("unlearn.track_config.check_installed", lambda name: None)
    monkeypatch.setattr("unlearn.launch.jobs.Slurm.check", lambda self: None)
    found = [one for command in commands(page.read_text()) if (one := program(command)) is not None]
    for name, words in found:
        if not {"misdirect", "METHOD"} & set(words):  # a method that is added, and any one
            check(name, words)
    assert found or page.name in ("add-a-method.md", "muon.md", "one-step.md")


def test_make_compare_is_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags are read before the first of its runs: one that is unknown stopped it after the lens was fitted."""
    result = subprocess.run(["make", "-n", "compare"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = result.stdout.replace("\\\n", " ").splitlines()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/compare-world/development").mkdir(parents=True)
    found = [one for line in lines if (one := program(line)) is not None]
    assert [name for name, _ in found] == ["world", "fit-lens", "launch/compare.py"]
    for name, words in found:
        check(name, words)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/your-model.md", "docs/evaluate.md", "docs/share.md"])
def test_a_page_is_walked_through(page: str, tmp_path: Path) -> None:
    """Its commands in order, from a fresh clone, one process in place of four."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    text = (clone / page).read_text()
    if page == "docs/share.md":  # it speaks of the run of another page
        text = (clone / "docs/your-model.md").read_text().replace("python -m unlearn push", "ls") + text
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = 0
    for command in commands(text):
        words = program(command)
        hub = words is not None and words[0] == "train.py" and not {"--model", "--config"} & set(words[1])
        unfinished = command.startswith("unlearn export")  # a finished run has no checkpoints
        if ELSEWHERE.search(command.partition("#")[0].partition("<<")[0]) or hub or unfinished:
            continue
        line = re.sub(r"torchrun --nproc_per_node \d", "python", command)
        result = subprocess.run(
            ["bash", "-c", line], cwd=clone, capture_output=True, text=True, timeout=600, env=environment
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        ran += 1
    assert ran > 3 or page == "README.md"
