"""What a run computes on, on machines with GPUs that are made up: a run that meant a GPU never gets a CPU unsaid."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_commands import flags

from unlearn import device
from unlearn.config import TrainConfig
from unlearn.device import choose_device, gpus_here
from unlearn.errors import UserError
from unlearn.evals.attack.config import TamperConfig
from unlearn.evals.eval_config import EvalConfig
from unlearn.fit_config import FitLensConfig

VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  {}  Release Build\nGCC version:  gcc 11.4.0\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that this machine has some GPUs and a driver, and torch is built for some CUDA and cannot use them."""
    monkeypatch.setattr(device, "DEV", tmp_path / "dev")
    monkeypatch.setattr(device, "PROC", tmp_path / "proc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(gpus: int, driver: str | None, cuda: str | None) -> None:
        for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(gpus))]:
            (tmp_path / "dev").mkdir(exist_ok=True)
            (tmp_path / "dev" / name).touch()
        if driver is not None:
            (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
            (tmp_path / "proc/driver/nvidia/version").write_text(VERSION.format(driver))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130" if cuda else "2.13.0+cpu")

    return make


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        (
            "550.54.15",
            "13.0",
            "is built for CUDA 13.0, the driver is 550.54.15: it needs `pip install",
        ),
        ("550.54.15", "13.0", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126`"),
        ("580.65.06", None, "is built without CUDA, the driver is 580.65.06"),
        ("580.65.06", None, "https://download.pytorch.org/whl/cu130`"),
        ("580.65.06", "13.0", "it needs access to them (`nvidia-smi`"),
        ("470.57.02", "13.0", "a driver of 525 or newer"),
        (None, "13.0", "the driver is unknown"),
    ],
)
def test_gpus_that_torch_cannot_use_are_an_error(
    machine: Callable[..., None], driver: str | None, cuda: str | None, said: str
) -> None:
    """A wheel without CUDA, or for a newer one than the driver's, trained a 6.9 B model on the CPU without a word."""
    machine(4, driver, cuda)
    for asked in (None, "cuda"):
        with pytest.raises(UserError) as caught:
            choose_device(asked)
        assert "found that it cannot" in str(caught.value) and said in str(caught.value)
        assert "the 4 GPU(s) of this machine" in str(caught.value) and "--device cpu" in str(caught.value)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_machine_without_gpus_computes_on_its_cpu(machine: Callable[..., None]) -> None:
    machine(0, None, None)
    assert choose_device(None) == torch.device("cpu")
    with pytest.raises(UserError, match="expected a GPU for --device cuda; found none here"):
        choose_device("cuda")


@pytest.mark.parametrize("devices", ["", "-1", "NoDevFiles"])
def test_gpus_that_the_user_has_hidden_do_not_count(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    machine(4, "580.65.06", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert choose_device(None) == torch.device("cpu")


def test_nvidia_smi_is_asked_where_there_are_no_device_files(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(0, None, "13.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(
        "#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: H (UUID: GPU-1)' && echo 'GPU 1: H (UUID: GPU-2)' || echo 550.54.15\n"
    )
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    assert gpus_here() == 2
    with pytest.raises(UserError, match=r"the 2 GPU\(s\).* the driver is 550\.54\.15"):
        choose_device(None)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="expected a GPU for each rank of this node; found 1 for 4 ranks"):
        choose_device(None)


def test_every_command_that_computes_takes_the_flag() -> None:
    for config in (TrainConfig, FitLensConfig, TamperConfig, EvalConfig):
        assert config.__dataclass_fields__["device"].default is None


def test_a_run_says_and_records_its_device(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    """Nothing that was printed or recorded named a device."""
    said = attempt(*flags(home, tmp_path / "run"), "--device", "cpu")
    assert said.splitlines()[0].startswith("device: CPU (")
    recorded = json.loads((tmp_path / "run/run.json").read_text())["attempts"][0]
    assert recorded["device"].startswith("CPU (")
