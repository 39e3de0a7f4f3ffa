"""Flags: defaults of each mode, refusals, speed of --help."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from unlearn.config import configure
from unlearn.errors import UserError

ROOT = Path(__file__).parent.parent


def test_published_values_of_each_mode() -> None:
    full = configure(optimizer="muon")
    assert (full.remove_coef, full.retain_coef, full.examples, full.retain_loss) == (2.0, 1.0, 1024, "kl")
    assert (full.muon_lr, full.adam_lr, full.momentum, full.lora_alpha) == (1e-3, 3e-4, 0.95, None)
    lora = configure(lora_rank=16)
    assert (lora.remove_coef, lora.retain_coef, lora.examples, lora.retain_loss) == (5.0, 5.0, 8192, "l2")
    assert (lora.adam_lr, lora.muon_lr, lora.lora_alpha, lora.lora_dropout) == (1e-3, None, 16.0, 0.05)
    assert full.muon_floor == 0.01 and configure(optimizer="muon", muon_method="quintic").muon_floor is None
    assert full.layers == (5, 10, 15, 20, 25, 30) and full.batch == 32
    assert full.lens == "EleutherAI/deep-ignorance-unfiltered-lens"
    assert full.output == "runs/deep-ignorance-unfiltered-full-muon"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"lora_alpha": 3.0}, "--lora-alpha"),
        ({"lora_dropout": 0.1}, "--lora-dropout"),
        ({"lora_targets": ("dense",)}, "--lora-targets"),
        ({"muon_lr": 0.1}, "--muon-lr"),
        ({"muon_method": "gram"}, "--muon-method"),
        ({"muon_floor": 0.1}, "--muon-floor"),
        ({"optimizer": "muon", "muon_method": "quintic", "muon_floor": 0.1}, "--muon-floor"),
        ({"optimizer": "muon", "lora_rank": 4, "muon_qkv": "split"}, "--muon-qkv"),
        ({"momentum": 0.9}, "--momentum"),
        ({"optimizer": "muon", "lora_rank": 4, "adam_lr": 0.1}, "--adam-lr"),
        ({"eval_every": 4}, "--eval-every"),
        ({"data_dir": "x"}, "--data-dir"),
        ({"limit": 4}, "--limit"),
        ({"retain_coef": 0.0, "retain_loss": "kl"}, "--retain-loss"),
        ({"retain_coef": 0.0, "retain_start": 0.5}, "--retain-start"),
        ({"retain_coef": 0.0, "retain": "x.jsonl"}, "--retain"),
        ({"remove_coef": 0.0, "forget_loss": "sampled"}, "--forget-loss"),
        ({"remove_coef": 0.0, "lens": "x"}, "--lens"),
        ({"forget_column": "a", "forget_template": "{a}"}, "--forget-column"),
    ],
)
def test_flag_without_effect_is_refused(flags: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"{named} has no effect"):
        configure(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"layers": ()},
        {"layers": (1, 1)},
        {"lora_rank": -1},
        {"lora_rank": 4, "lora_dropout": 1.0},
        {"remove_coef": float("nan")},
        {"remove_coef": 0.0, "retain_coef": 0.0},
        {"retain_start": 1.5},
        {"adam_lr": 0.0},
        {"clip": 0.0},
        {"warmup_ratio": 1.0},
        {"batch": 0},
        {"micro_batch": 0},
        {"examples": 0},
        {"seq_len": 2},
        {"seed": -1},
        {"eval_tasks": ("mmlu",), "limit": 0},
    ],
)
def test_numbers_out_of_range(flags: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected --"):
        configure(**flags)


def test_target_layers_must_exist() -> None:
    configure(layers=(0, 4)).check_depth(4)
    with pytest.raises(UserError, match=r"0\.\.4 .*found 5"):
        configure(layers=(1, 5)).check_depth(4)
    with pytest.raises(UserError, match=r"0\.\.3 .*found 4"):
        configure(layers=(4,), lens_tap="output").check_depth(4)
    with pytest.raises(UserError, match="--lens has no effect"):
        configure(layers=(4,), lens="somewhere").check_depth(4)


def test_target_layers_that_no_loss_reads_need_not_exist() -> None:
    """--remove-coef 0 --retain-loss kl could not start on a model of fewer than 30 blocks, with --layers or without."""
    flags = {"remove_coef": 0.0, "retain_loss": "kl"}
    configure(**flags).check_depth(4)
    with pytest.raises(UserError, match="--layers has no effect"):
        configure(**flags, layers=(1, 2))
    with pytest.raises(UserError, match="--layers in 0"):
        configure(remove_coef=0.0, retain_loss="l2").check_depth(4)


@pytest.mark.parametrize("script", ["train.py", "evals/run.py", "evals/tamper.py", "-m unlearn", "launch/demo.py"])
@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
def test_help_and_wrong_flags_answer_at_once(script: str, flag: str) -> None:
    """Within a second on an idle machine: some 300 modules are imported, and torch alone would be 1,500 more."""
    command = [sys.executable, "-X", "importtime", *script.split(), flag]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    imported = [line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line not in said]
    assert (result.returncode == 0) == (flag == "--help"), said
    assert "Traceback" not in result.stderr and (result.stdout + "".join(said)).strip()
    heavy = {"torch", "numpy", "transformers", "datasets", "lm_eval", "pyarrow", "scipy", "matplotlib"}
    assert not heavy & {name.partition(".")[0] for name in imported}
    assert 50 < len(imported) < 600


def test_the_package_lists_its_folders() -> None:
    """A folder that the list lacks, or names in vain, breaks every fresh installation and no checkout in use."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {file.parent.relative_to(ROOT) for file in ROOT.glob("unlearn/**/*.py")}
    assert sorted(listed) == sorted(str(folder).replace("/", ".") for folder in found)


def test_arrows_point_one_way() -> None:
    """launch -> evals -> the rest of the package; only the table of commands knows all three."""
    for file in ROOT.glob("unlearn/**/*.py"):
        storey = file.relative_to(ROOT / "unlearn").parts[0]
        above = {"launch": (), "evals": ("launch",), "__main__.py": ()}.get(storey, ("evals", "launch"))
        for node in ast.walk(ast.parse(file.read_text())):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith(f"unlearn.{one}") for name in named for one in above), (file, named)
