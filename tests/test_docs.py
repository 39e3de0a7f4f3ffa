"""The pages with code in them, done as they say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.assemble import build
from unlearn.config import configure
from unlearn.optim.build import make_schedule
from unlearn.run.log import MetricsLog
from unlearn.trainer import train

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
    (name,) = re.findall(r'"[\w-]+"', names)
    listed.write_text(listed.read_text().replace("METHODS = (\n", f"METHODS = (\n    {name},\n", 1))
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


@pytest.mark.usefixtures("token_cache")
def test_one_step_is_the_trainers_to_the_bit(home: Path) -> None:
    torch.set_num_threads(1)  # threads split the sums of the page, whose forward passes end at the top, differently
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/one-step.md").read_text(), flags=re.DOTALL)
    places = {"runs/world/model": home / "model", "runs/lens": home / "lens"}
    places |= {name: home / name for name in ("forget.jsonl", "retain.jsonl")}
    for name, place in places.items():
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(place)))
    page: dict[str, Any] = {}
    exec(code, page)

    run = build(
        configure(
            model=str(home / "model"),
            lens=str(home / "lens"),
            forget=str(home / "forget.jsonl"),
            retain=str(home / "retain.jsonl"),
            layers=page["LAYERS"],
            seq_len=page["SEQ_LEN"],
            examples=page["EXAMPLES"],
            batch=page["BATCH"],
            micro_batch=page["BATCH"],
            retain_start=page["RETAIN_START"],
            dtype="fp32",
        ),
        torch.device("cpu"),
    )
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    schedule = make_schedule("linear", run.steps)
    with MetricsLog(None, run.steps, "test") as log:
        train(run.model, run.loss, run.optimizers, steps=run.steps, schedule=schedule, log=log, clip=page["CLIP"])
    assert run.steps == page["STEPS"]
    for (name, found), expected in zip(page["model"].named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(found, expected) and not torch.equal(found, before[name]), name
