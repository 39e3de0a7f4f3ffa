"""The commands as a user types them: one good run of each, and every mistake in one sentence without a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, tiny_model, tiny_tokenizer, write_corpus, write_home
from evals_support import question, write_wmdp
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from unlearn.errors import UserError
from unlearn.fit_config import FitLensConfig
from unlearn.fit_lens import fit_lens
from unlearn.lora import add_lora, load_adapter, merge_lora
from unlearn.model import load_model, save_model
from unlearn.run.folder import ATTACK, LENS, RUN, check_output, claim

ROOT = Path(__file__).parent.parent
INPUT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def run(*command: object, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    words = [*start, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def flags(home: Path, folder: Path, **changes: object) -> list[object]:
    """A quick run of train.py, with some flags changed; None leaves one out."""
    settings: dict[str, object] = {
        "model": home / "model",
        "lens": home / "lens",
        "forget": home / "forget.jsonl",
        "retain": home / "retain.jsonl",
        "output": folder,
        "layers": "1 3 4",
        "seq-len": 24,
        "batch": 6,
        "micro-batch": 3,
        "examples": 15,
        "dtype": "fp32",
        "lora-rank": 2,
    } | changes
    words: list[object] = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *str(value).split()]
    return words


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_wmdp(folder, [question(index, answer=index % 4, said=None) for index in range(12)])
    return folder


@pytest.fixture(scope="module")
def trained(home: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run with evaluations, on one rank."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    result = run("train.py", *flags(home, output, **{"eval-tasks": "wmdp_bio", "eval-every": 2, "data-dir": data}))
    assert result.returncode == 0, result.stderr
    for words in (
        "unique examples 15",
        "windows trained on 15",
        "effective epochs 1.00",
        "optimizer steps 3",
        "trainable parameters 2,816 of",
    ):
        assert words in result.stdout
    return output


def test_run_folder(trained: Path) -> None:
    names = {"config.json", "run.json", "metrics.jsonl", "model", "adapter", "evals"}
    assert {path.name for path in trained.iterdir()} == names
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "forget_loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    expected = {
        "forget_loss",
        "retain_loss",
        "loss",
        "forget_weight",
        "retain_weight",
        "gradient_norm",
        "adamw_lr",
        "tokens_per_second",
        "tflops_per_rank",
        "peak_gib",
        "seconds",
        "uniform_loss/1",
        "entropy/4",
    }
    assert expected <= steps[0].keys()
    assert [line["step"] for line in lines if "wmdp_bio/acc" in line] == [0, 2, 3]
    assert sorted(path.name for path in (trained / "evals").iterdir()) == [
        "step-000000.json",
        "step-000002.json",
        "step-000003.json",
    ]
    assert json.loads((trained / "config.json").read_text())["lora_alpha"] == 16.0


def test_exported_model_and_adapter_agree(home: Path, trained: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    base = load_model(str(home / "model"))
    with torch.no_grad():
        original = base(INPUT).logits
        load_adapter(base, trained / "adapter")
        adapted = base.eval()(INPUT).logits
        merge_lora(base)
        assert torch.equal(base(INPUT).logits, exported(INPUT).logits)
    assert not torch.equal(original, adapted)
    torch.testing.assert_close(adapted, exported(INPUT).logits, rtol=1e-4, atol=1e-4)


def test_exported_adapter_loads_in_peft(home: Path, trained: Path) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(home / "model", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, str(trained / "adapter")).eval()
    exported = AutoModelForCausalLM.from_pretrained(trained / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(INPUT).logits, exported(INPUT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_export_the_same_model(home: Path, trained: Path, tmp_path: Path) -> None:
    result = run("train.py", *flags(home, tmp_path / "two"), ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (load_model(str(folder / "model")).state_dict() for folder in (trained, tmp_path / "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["output"] == str(tmp_path / "two")


def test_full_training_with_muon_in_bf16(home: Path, tmp_path: Path) -> None:
    changes = {"lora-rank": None, "optimizer": "muon", "dtype": "bf16", "retain-start": 1, "clip": "inf"}
    result = run("train.py", *flags(home, tmp_path / "muon", **changes))
    assert result.returncode == 0, result.stderr
    assert "muon     4 x [96, 32]" in result.stdout and "full training" in result.stdout
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "muon" / "model")
    assert exported.dtype == torch.bfloat16 and not (tmp_path / "muon" / "adapter").exists()


def test_fit_lens_is_read_by_train(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    corpora = ["--forget", home / "forget.jsonl", "--retain", home / "retain.jsonl"]
    sizes = ["--steps", 30, "--seq-len", 24, "--micro-batch", 16, "--dtype", "fp32", "--lr", "3e-3"]
    fit = ["-m", "unlearn", "fit-lens", "--model", home / "model", *corpora, "--output", tmp_path / "lens", *sizes]
    result = run(*fit)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "lens" / "fit.json").read_text())
    for plain, tuned in zip(report["logit_lens"], report["tuned_lens"], strict=True):
        assert tuned["kl"] < plain["kl"]
    assert "unlearned model" in attempt(*flags(home, tmp_path / "run", lens=tmp_path / "lens"))
    result = run(*fit)
    assert result.returncode == 0 and "finished before: tuned lens" in result.stdout
    result = run(*fit, "--resume", "never")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "python -m unlearn: error: expected a new folder for --output" in result.stderr


def test_a_lens_of_some_layers(home: Path, tmp_path: Path, attempt: Callable[..., str], token_cache: Path) -> None:
    """It has these alone, says so, and serves a method that reads no other."""
    shared: dict[str, Any] = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    shared |= {"model": str(home / "model"), "steps": 2, "batch": 4, "seq_len": 24, "dtype": "fp32"}
    fit_lens(FitLensConfig(output=str(tmp_path / "lens"), layers=(3, 1), **shared))
    report = json.loads((tmp_path / "lens/fit.json").read_text())
    assert report["layers"] == [1, 3] and len(report["tuned_lens"]) == len(report["logit_lens"]) == 2
    with safe_open(tmp_path / "lens/params.safetensors", "pt") as file:
        assert set(file.keys()) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    fits = flags(home, tmp_path / "run", lens=tmp_path / "lens", layers="1 3")
    assert "unlearned model" in attempt(*fits)
    said = attempt(*flags(home, tmp_path / "other", lens=tmp_path / "lens", layers="1 2"))
    assert "expected the tensor 2.weight" in said and "--layers" in said
    for layers, wrong in (((4,), "--layers in 0..3"), ((1, 1), "every layer after --layers once")):
        with pytest.raises(UserError, match=wrong):
            fit_lens(FitLensConfig(output=str(tmp_path / "none"), layers=layers, **shared))


def test_a_lens_that_learnt_nothing_is_the_logit_lens(home: Path, tmp_path: Path, token_cache: Path) -> None:
    """fit.json compared a logit lens measured in float32 with a tuned lens measured in bf16."""
    config = FitLensConfig(
        model=str(home / "model"),
        forget=str(home / "forget.jsonl"),
        retain=str(home / "retain.jsonl"),
        output=str(tmp_path / "lens"),
        steps=1,
        seq_len=24,
        micro_batch=16,
        lr=1e-12,
    )
    fit_lens(config)
    report = json.loads((tmp_path / "lens" / "fit.json").read_text())
    assert report["logit_lens"] == report["tuned_lens"] and report["logit_lens"][0]["kl"] > 0.0


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_attack(home: Path, data: Path, tmp_path: Path, ranks: int) -> None:
    sizes = (
        "--batch 4 --examples 10 --seq-len 24 --eval-every 2 --eval-tasks wmdp_bio --adam-lr 1e-3 --dtype fp32".split()
    )
    words = ["evals/tamper.py", "--model", home / "model", "--forget", home / "forget.jsonl", "--data-dir", data]
    result = run(*words, "--output", tmp_path / "attack", *sizes, "--export", ranks=ranks)
    assert result.returncode == 0, result.stderr
    attack = json.loads((tmp_path / "attack" / "attack.json").read_text())
    assert [point["step"] for point in attack["points"]] == [0, 2, 3]
    assert {"acc", "interval", "questions", "predicted", "debiased"} <= attack["points"][0]["tasks"]["wmdp_bio"].keys()
    attacked = tmp_path / "attack/attacks/unlearned/attack"
    before, after = (load_model(str(folder / "model")).state_dict() for folder in (home, attacked))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 40, "every kind of parameter is attacked"


MISTAKES = {
    "missing-corpus": ({"forget": "/nowhere/forget.jsonl"}, "found nothing at /nowhere/forget.jsonl"),
    "wrong-column": ({"forget-column": "body"}, "text column 'body'"),
    "layer": ({"layers": "1 5"}, "--layers in 0..4"),
    "missing-lens": ({"lens": "/nowhere/lens"}, "found nothing at /nowhere/lens"),
    "lens-is-a-model": ({"lens": "MODEL"}, "expected the tensor 1.weight"),
    "missing-model": ({"model": "/nowhere/model"}, "found nothing at /nowhere/model"),
    "hub-model": ({"model": "somebody/model"}, "hf download somebody/model"),
    "lora-target": ({"lora-targets": "q_proj"}, "--lora-targets among"),
    "unknown-task": ({"eval-tasks": "wmdp_boi"}, "wmdp_boi"),
    "missing-data": ({"eval-tasks": "wmdp_bio", "data-dir": "/nowhere"}, "/nowhere"),
    "unwritable": ({"output": "/proc/runs/x"}, "/proc/runs/x"),
    "output-is-a-file": ({"output": "FILE"}, "found the file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_train(home: Path, tmp_path: Path, attempt: Callable[..., str], name: str) -> None:
    changes, fragment = MISTAKES[name]
    (tmp_path / "file").write_text("")
    places = {"MODEL": str(home / "model"), "FILE": str(tmp_path / "file")}
    changes = {key: places.get(value, value) for key, value in changes.items()}
    assert fragment in attempt(*flags(home, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_read_the_corpus(tmp_path: Path, attempt: Callable[..., str], token_cache: Path) -> None:
    """Both were IndexErrors in the first step (on a GPU an assertion of the device), after the folder was claimed."""
    home = write_home(tmp_path / "home", tiny_tokenizer(), "gpt2")
    (home / "retain.jsonl").write_text(json.dumps({"text": "jasper kaolin " * 100}))
    assert "at most 128 tokens, the positions that the model has learned" in attempt(
        *flags(home, tmp_path / "run", **{"seq-len": 2048})
    )
    save_model(tiny_model("gpt2", vocab_size=200), tiny_tokenizer(), home / "model")
    assert "expected a tokenizer of at most 200 tokens" in attempt(*flags(home, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_mistake_on_two_ranks_is_said_once(home: Path, tmp_path: Path) -> None:
    result = run("train.py", *flags(home, tmp_path / "run", layers="9"), ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: expected --layers in 0..4") == 1, result.stderr


def test_flag_mistakes(home: Path, tmp_path: Path) -> None:
    result = run("train.py", *flags(home, tmp_path / "run", **{"lora-rank": None, "lora-alpha": 3}))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "--lora-alpha has no effect without --lora-rank" in " ".join(result.stderr.replace("│", "").split())


def test_existing_output_is_kept(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    folder = tmp_path / "run"
    claim(check_output(str(folder), False), {"clip": float("inf"), "overwrite": False}, "none", {}, {})
    (folder / "model").mkdir()
    assert "found an earlier run" in attempt(*flags(home, folder))
    assert (folder / "model").is_dir()
    assert "unlearned model" in attempt(*flags(home, folder), "--overwrite")
    assert (folder / "model" / "model.safetensors").is_file()
    (folder / "thesis.tex").write_text("do not delete")
    assert "'thesis.tex'" in attempt(*flags(home, folder), "--overwrite")
    assert (folder / "thesis.tex").is_file()


def test_outputs_that_would_destroy_something(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    run_folder = tmp_path / "run"
    assert "unlearned model" in attempt(*flags(home, run_folder))
    again = flags(home, run_folder, model=run_folder / "model", lens=home / "lens")
    assert "found" in attempt(*again, "--overwrite") and (run_folder / "model" / "config.json").is_file()
    with pytest.raises(UserError, match="'adapter'"):
        check_output(str(run_folder), True, ATTACK)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("do not delete")
    for own in (RUN, ATTACK, LENS):
        with pytest.raises(UserError, match=r"thesis\.txt"):
            check_output(str(precious), True, own)


def test_output_may_be_a_mount_point_or_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    claim(check_output(str(tmp_path / "link"), False), {"seed": 1, "overwrite": False}, "none", {}, {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    monkeypatch.chdir(tmp_path / "real")
    assert check_output(".", True) == tmp_path / "real"


def test_revision_of_a_local_model(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    assert "--revision has no effect" in attempt(*flags(home, tmp_path / "run", revision="main"))


def test_interrupted_run_leaves_no_model(home: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "long.jsonl", WORDS, documents=2000)
    other = write_corpus(tmp_path / "other.jsonl", WORDS, documents=2000, seed=1)
    words = flags(home, tmp_path / "run", forget=corpus, retain=other, examples=5000, batch=2)
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in error and "Traceback" not in error
    names = ["PREEMPTED", "checkpoints", "config.json", "metrics.jsonl", "run.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names


def test_nan_weights_are_refused(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for file in (home / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.dense.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "layers.0.attention.dense.bias" in attempt(*flags(home, tmp_path / "run", model=folder))


def test_too_high_a_learning_rate_stops_with_a_sentence(
    home: Path, tmp_path: Path, attempt: Callable[..., str]
) -> None:
    changes = {"lora-rank": None, "adam-lr": 1e25, "retain-start": 1}
    assert "found NaN or infinity at step" in attempt(*flags(home, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "model").exists()


def test_disk_full(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's own answer, and that of safetensors, which has an exception of its own."""
    from unlearn.files import atomic_folder

    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):
        with pytest.raises(UserError, match="No space left"):
            with atomic_folder(tmp_path / "model") as temporary:
                (temporary / "half").write_text("half a model")
                raise error
    assert not any(tmp_path.iterdir())


def test_adapters_are_seeded() -> None:
    from conftest import tiny_model

    first, second, other = (tiny_model() for _ in range(3))
    pairs = zip(add_lora(first, 2, 4.0, seed=1), add_lora(second, 2, 4.0, seed=1), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(add_lora(other, 2, 4.0, seed=2)[0], next(p for p in first.parameters() if p.requires_grad))
