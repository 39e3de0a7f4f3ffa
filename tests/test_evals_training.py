"""The suite on live models: in training (LoRA), and in the attack, on a subsample."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from evals_support import question, write_wmdp

ROOT = Path(__file__).parent.parent


def run(ranks: int, *words: object) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_training_asks_the_same_subsample_every_time(home: Path, tmp_path: Path) -> None:
    """On two ranks; test_commands.py trains with evaluations on one."""
    write_wmdp(tmp_path / "data", [question(i, i % 4, None) for i in range(30)])
    run(
        2,
        *("train.py", "--model", home / "model", "--lens", home / "lens", "--output", tmp_path / "run"),
        *("--forget", home / "forget.jsonl", "--retain", home / "retain.jsonl", "--layers", 1, 4, "--lora-rank", 2),
        *("--seq-len", 24, "--batch", 6, "--micro-batch", 3, "--examples", 15, "--dtype", "fp32"),
        *("--eval-tasks", "wmdp_bio", "--data-dir", tmp_path / "data", "--eval-every", 2, "--eval-subsample", 9),
    )
    files = sorted((tmp_path / "run" / "evals").iterdir())
    assert [file.name for file in files] == ["step-000000.json", "step-000002.json", "step-000003.json"]
    for file in files:
        numbers: dict[str, Any] = json.loads(file.read_text())["wmdp_bio"]
        assert numbers["questions"] == 9
        assert {"interval", "debiased", "letter_check", "independent", "p_more", "tie_rate"} <= numbers.keys()


def test_attack_measures_the_same_suite(home: Path, tmp_path: Path) -> None:
    write_wmdp(tmp_path / "data", [question(i, i % 4, None) for i in range(30)])
    run(
        1,
        *("evals/tamper.py", "--model", home / "model", "--forget", home / "forget.jsonl", "--dtype", "fp32"),
        *("--output", tmp_path / "attack", "--batch", 4, "--examples", 10, "--seq-len", 24, "--eval-every", 2),
        *("--eval-tasks", "wmdp_bio", "--data-dir", tmp_path / "data", "--eval-subsample", 9),
    )
    points = json.loads((tmp_path / "attack" / "attack.json").read_text())["points"]
    assert len(points) == 3
    for point in points:
        assert point["tasks"]["wmdp_bio"]["questions"] == 9 and "letter_check" in point["tasks"]["wmdp_bio"]
