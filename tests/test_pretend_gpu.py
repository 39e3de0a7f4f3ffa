"""The step of every layout and method on a pretend GPU: nothing mixes devices, and nothing waits for a micro-batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import TORCH

from unlearn.methods import METHODS

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(TORCH), reason=f"the pretend device is made of private parts of torch {TORCH}"
)
SCRIPT = Path(__file__).with_name("pretend_gpu.py")
SIZES = {"micro_batch": 2, "batch": 16, "examples": 32}
LORA = {"lora_rank": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {"optimizer": "muon", "shard": "full"},
    "lora": LORA,
    "lora, selective": LORA | {"checkpoint_activations": "selective"},
    "hybrid": {"optimizer": "muon", "shard": "hybrid", "shard_size": 2},
    "replicated": {"optimizer": "muon", "shard": "replicate", "dtype": "fp32"},
    "lora, sharded": LORA | {"shard": "full"},
    "sampled": {"forget_loss": "sampled", "retain_loss": "l2", "optimizer": "muon"},
    "offloaded": {"offload_reference": True},
    "everything kept": {"checkpoint_activations": "none"},
}
OWN = {"rmu": {"layers": [2]}, "circuit-breakers": {"layers": [1, 3]}}
FAST = ("full", "lora")


def traffic(flags: dict[str, Any], method: str = "lens", ranks: int = 4) -> dict[str, Any]:
    """What the script prints."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(SIZES | flags), method, str(ranks)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return dict(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_step_of_every_layout_stays_on_its_device(name: str) -> None:
    found = traffic(LAYOUTS[name] | {"layers": [1, 2]})
    assert found.get("copies waited for", 0) == found.get("numbers read", 0) == 0
    if name != "offloaded":
        assert found["copies"] == 16, "four tensors of each of two micro-batches of two terms"
    if name == "lora":
        assert found["threads"] and "MainThread" not in found["threads"], "backward has a thread of the device's own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        (method, layout)
        for method in METHODS
        for layout in ("full", "lora")
        if method not in ("lens", "reset") and (layout, method) not in (("lora", "distill"), ("lora", "distort"))
    ],
)
def test_a_step_of_every_method_stays_on_its_device(method: str, layout: str) -> None:
    """`reset` takes none; what adds noise to all weights takes no adapters."""
    found = traffic(LAYOUTS[layout] | OWN.get(method, {}), method)
    assert found.get("copies waited for", 0) == found.get("numbers read", 0) == 0
