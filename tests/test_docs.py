"""docs/add-a-method.md, done as it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_method_is_added_as_the_page_says(home: Path, tmp_path: Path) -> None:
    """The file and the name are all that is written; then its help, and a run with it."""
    page = (ROOT / "docs/add-a-method.md").read_text()
    file, names = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"^python (train\.py .*)$", page, flags=re.MULTILINE)
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "unlearn", copy / "unlearn", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", copy)
    (copy / "unlearn/methods/misdirect.py").write_text(file)
    listed = copy / "unlearn/methods/__init__.py"
    listed.write_text(re.sub(r"^METHODS = .*$", names.strip(), listed.read_text(), flags=re.MULTILINE))
    places = {"MODEL": home / "model", "FORGET": home / "forget.jsonl", "RETAIN": home / "retain.jsonl"}
    words = [str(places.get(word, word)) for word in command.split()]
    words = [str(tmp_path / "run") if word == "RUN" else word for word in words]
    small = ["--seq-len", "24", "--batch", "8", "--examples", "16", "--lora-rank", "2"]
    for line in ([*words[:3], "--help"], [*words, *small]):
        result = subprocess.run([sys.executable, *line], cwd=copy, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
    assert (
        "--steering"
        in subprocess.run(
            [sys.executable, *words[:3], "--help"], cwd=copy, capture_output=True, text=True, timeout=60
        ).stdout
    )
    assert (tmp_path / "run/model/model.safetensors").exists()
