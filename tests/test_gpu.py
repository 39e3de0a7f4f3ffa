"""The same numbers on a GPU as on the CPU. Skipped without CUDA."""

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import hide_gpus
from evals_support import make_model, make_tokenizer
from test_losses import language_model
from test_methods import config, gradients_of
from torch._dynamo.utils import counters

from unlearn.assemble import build
from unlearn.config import TrainConfig, configure
from unlearn.evals.harness.lm import LiveModel
from unlearn.losses import logits_of
from unlearn.methods import METHODS
from unlearn.seeding import dropped, keep_mask
from unlearn.trainer import check_gradients, clip_gradients, summed
from unlearn.weights import local_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("token_cache", "gpus"),
]
ROOT = Path(__file__).parents[1]
MODES: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 3, "lora_dropout": 0.2},
    "full": {"optimizer": "muon"},
    "sampled": {"forget_loss": "sampled"},
    "sharded": {"shard": "full"},
    "selective": {"lora_rank": 3, "lora_dropout": 0.2, "checkpoint_activations": "selective"},
    "latent attack": {"latent_attack": 2, "latent_layers": (0, 1)},
    "adversary": {"adversary": "relearn", "adversary_rank": 2},
}
OWN: dict[str, dict[str, Any]] = {  # flags without which a method does not start, or changes nothing at once
    "rmu": {"layers": (2,)},
    "circuit-breakers": {"layers": (1, 3)},
    "next-token": {"retain": None},
    "undial": {"retain": None},
    "distort": {"forget": None},
}


@pytest.fixture
def gpus(hidden_gpus: pytest.MonkeyPatch) -> Iterator[None]:
    hidden_gpus.undo()
    yield
    hide_gpus(hidden_gpus)


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_equal_the_cpus(home: Path, mode: str) -> None:
    """Dropout masks and sampled targets included: they are hashes, not a device's random numbers."""
    runs = [build(config(home, **MODES[mode]), torch.device(device)) for device in ("cpu", "cuda")]
    for run in runs:
        run.model.train()
    expected, metrics = (gradients_of(run, 1) for run in runs)
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key].cpu(), value, rtol=1e-4, atol=1e-5)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            on_gpu, on_cpu = local_rows(other.grad)[0].cpu(), local_rows(one.grad)[0]
            torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-4)


def of_method(home: Path, method: str, **more: Any) -> TrainConfig:
    """Small flags of a method."""
    paths = {"model": str(home / "model")} | {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    sizes = {"seq_len": 24, "batch": 6, "examples": 20, "micro_batch": 4, "dtype": "fp32"}
    flags = paths | sizes | OWN.get(method, {}) | more
    return configure(method, **{name: value for name, value in flags.items() if value is not None})


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("lens", "reset")])
def test_every_methods_loss_and_gradient_equal_the_cpus(home: Path, method: str) -> None:
    runs = [build(of_method(home, method), torch.device(device)) for device in ("cpu", "cuda")]
    for run in runs:
        run.model.train()
    expected, metrics = (gradients_of(run, 1) for run in runs)
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key].cpu(), value, rtol=1e-4, atol=1e-5)
    largest = max(p.grad.abs().max().item() for p in runs[0].model.parameters() if p.grad is not None)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-2, atol=1e-4 * largest)


@pytest.mark.parametrize("kind", ["full", "selective", "none"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_recomputation_changes_no_bit(home: Path, mode: str, kind: str) -> None:
    found = []
    for checkpointing in ("full", kind):
        flags = MODES[mode] | {"checkpoint_activations": checkpointing, "dtype": "bf16"}
        run = build(config(home, **flags), torch.device("cuda"))
        run.model.train()
        gradients_of(run, 1)
        found.append([p.grad.clone() for p in run.model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_compiled_blocks_are_one_graph_for_all_blocks(home: Path, mode: str) -> None:
    """And compute what the others do, within bfloat16's rounding of a few sums."""
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for compiled in (False, True):
        run = build(config(home, **MODES[mode], compile_blocks=compiled), torch.device("cuda"))
        run.model.train()
        losses.append(gradients_of(run, 1)["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 6 and not counters["recompile_limit"]


def test_an_evaluation_equals_the_cpus() -> None:
    model, tokenizer = make_model("neox", positions=256), make_tokenizer()
    pairs = [(f"Question {number}:", f" answer {number % 7}") for number in range(40)]
    asked: list[Any] = [SimpleNamespace(args=pair, task_name="test") for pair in pairs]
    found = []
    for device in ("cpu", "cuda"):
        live = LiveModel(model.to(device), tokenizer, batch_tokens=100)
        found.append(torch.tensor([score for score, _ in live.loglikelihood(asked, disable_tqdm=True)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_step_waits_for_the_gpu_seldom(home: Path) -> None:
    """Not once a micro-batch: a full step with Muon of 8 micro-batches."""
    run = build(config(home, optimizer="muon", batch=8, micro_batch=2, dtype="bf16"), torch.device("cuda"))

    def step(number: int) -> None:
        metrics = gradients_of(run, number)
        norm = check_gradients(trained, metrics, number)
        clip_gradients(trained, 1.0, norm)
        for optimizer in run.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        summed(metrics, norm.device)

    run.model.train()
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    step(0)  # makes the optimizers' states
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = Counter(f"{one.filename}:{one.lineno}" for one in found if "synchroniz" in str(one.message))
    assert sum(where.values()) <= 12, where


@pytest.mark.slow
def test_two_runs_of_train_py_have_the_same_bits(home: Path, tmp_path: Path) -> None:
    flags = "--layers 1 3 4 --seq-len 24 --batch 6 --examples 20 --epochs 2 --micro-batch 4 --optimizer muon".split()
    paths = [word for name in ("model", "lens") for word in (f"--{name}", str(home / name))]
    paths += [word for name in ("forget", "retain") for word in (f"--{name}", str(home / f"{name}.jsonl"))]
    for name in ("one", "other"):
        command = [sys.executable, "train.py", *flags, *paths, "--output", str(tmp_path / name)]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert found.returncode == 0, found.stderr
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("mode", MODES)
def test_bf16_steps_stay_finite(home: Path, mode: str) -> None:
    run = build(config(home, dtype="bf16", **MODES[mode]), torch.device("cuda"))
    run.model.train()
    for step in range(run.steps):
        assert all(torch.isfinite(torch.as_tensor(value)) for value in gradients_of(run, step).values())
        for optimizer in run.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "positions", "features"), [(2, 7, 1500), (3, 5, 1), (1, 1, 1024)])
def test_the_dropout_kernel_has_the_masks_bits(dtype: torch.dtype, rows: int, positions: int, features: int) -> None:
    keys = torch.randint(0, 2**31 - 1, (rows,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows, positions, features, dtype=dtype, device="cuda", requires_grad=True)
    found, mask = dropped(x, keys.cuda(), 0.3), keep_mask(keys, positions, features, 0.3).cuda()
    assert torch.equal(found, x * mask)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream * mask)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_bf16_are_float32(autocast: bool) -> None:
    """The product is summed in float32 there anyway, and must not be rounded on its way out."""
    hidden, _, matrix = (tensor.cuda() for tensor in language_model(0.0))
    exact = (hidden.double() @ matrix.double().T).float()
    if autocast:
        hidden, matrix = hidden.float(), matrix.float()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(logits_of(hidden, matrix), exact, rtol=1e-5, atol=1e-4)
