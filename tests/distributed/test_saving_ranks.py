"""Checkpoints that are written while steps go on: what they hold, when they are whole, and what an error leaves."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from unlearn.distributed import barrier, rank, world_size
from unlearn.errors import UserError
from unlearn.run import saving
from unlearn.run.checkpoint import Checkpoints, load, tensors
from unlearn.run.log import MetricsLog
from unlearn.run.stopping import StopSignals
from unlearn.weights import full

STEPS = 6


class Small(nn.Module):
    """Matrices of odd and of few rows, sharded over all ranks, and a replicated vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = {"odd": torch.randn(7, 3), "few": torch.randn(2, 5)}
        mesh = init_device_mesh("cpu", (world_size(),))
        for name, value in whole.items():
            self.register_parameter(name, nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])))
        self.vector = nn.Parameter(torch.randn(4))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@contextmanager
def run(folder: Path, every: int = 1) -> Iterator[tuple[Small, dict[str, torch.optim.Optimizer], Checkpoints]]:
    model = Small()
    optimizers: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(model.parameters(), lr=0.1)}
    with StopSignals(folder / "PREEMPTED") as stop, MetricsLog(None, STEPS, "test") as log:
        yield (
            model,
            optimizers,
            Checkpoints(folder, model, optimizers, log, steps=STEPS, every=every, keep=9, stop=stop),
        )


def whole_state(model: Small, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    return {name: full(tensor).clone() for name, tensor in tensors(model, optimizers)}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The last rank's writer waits until this file is there."""
    gate, write = tmp_path / "gate", dcp.FileSystemWriter.write_data

    def write_later(self: Any, *arguments: Any) -> Any:
        while rank() == world_size() - 1 and not gate.exists():
            time.sleep(0.01)
        result = write(self, *arguments)
        (tmp_path / f"written by {rank()}").touch()
        return result

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_later)
    return gate


def overtaken(folder: Path, gate: Path) -> tuple[list[list[str]], list[str]]:
    """The names of checkpoints after each step while a writer is slow; the states that are not of their step."""
    found, states = [], {}
    with run(folder, every=2) as (model, optimizers, checkpoints), checkpoints.during_steps():
        for step in range(1, STEPS):
            model.step(optimizers["adamw"])
            states[step] = whole_state(model, optimizers)
            if step == 4:
                gate.touch()
            checkpoints.after(step)
            barrier()
            found.append(sorted(path.name for path in (folder / "checkpoints").glob("*")))
            barrier()
    with run(folder) as (model, optimizers, _):
        odd = []
        for step in (2, 4):
            load(folder / f"checkpoints/step-{step:06d}", model, optimizers)
            again = whole_state(model, optimizers)
            odd += [f"{name} at {step}" for name in states[step] if not torch.equal(states[step][name], again[name])]
            assert states[step].keys() == again.keys()
    return found, odd


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_holds_the_bits_of_its_step_whatever_is_done_meanwhile(
    tmp_path: Path, slow: Path, ranks: int
) -> None:
    """It bears its final name once every rank has written; the next one waits for it."""
    for found, odd in run_ranks(ranks, overtaken, tmp_path, slow):
        assert odd == []
        assert found[:3] == [[], ["step-000002.tmp"], ["step-000002.tmp"]]
        assert found[3][0] == "step-000002" and found[3][1].startswith("step-000004")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def without_room(folder: Path) -> tuple[bool, list[str]]:
    """Whether the files are written before the next step where copies do not fit; the states that are not as saved."""
    with run(folder) as (model, optimizers, checkpoints), checkpoints.during_steps():
        model.step(optimizers["adamw"])
        expected = whole_state(model, optimizers)
        checkpoints.after(1)
        there = (folder / "checkpoints/step-000001").is_dir()
        model.step(optimizers["adamw"])
        load(folder / "checkpoints/step-000001", model, optimizers)
        found = whole_state(model, optimizers)
    return there, [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_wait_where_there_is_no_memory_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(saving, "host_memory_left", lambda: 0 if rank() == ranks - 1 else 2**40)
    assert run_ranks(ranks, without_room, tmp_path) == [(True, [])] * ranks


def refused(folder: Path) -> tuple[str, list[str]]:
    """What is said when the disk is full in the second of three saves; what is left."""
    said = ""
    with run(folder) as (model, optimizers, checkpoints):
        try:
            with checkpoints.during_steps():
                for step in (1, 2, 3):
                    model.step(optimizers["adamw"])
                    checkpoints.after(step)
        except UserError as error:
            said = str(error)
    barrier()
    return said, sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(("ranks", "refusal"), [(1, "errno"), (3, "errno"), (2, "torch")])
def test_a_full_disk_is_one_sentence_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, refusal: str
) -> None:
    write = dcp.FileSystemWriter.write_data

    def fill_up(self: Any, *arguments: Any) -> Any:
        if rank() == ranks - 1 and "000002" in str(self.path):
            time.sleep(0.2)
            if refusal == "errno":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise RuntimeError("[enforce fail at inline_container.cc:909] . PytorchStreamWriter failed writing file\n0")
        return write(self, *arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fill_up)
    for said, left in run_ranks(ranks, refused, tmp_path):
        assert "expected to write" in said and "step-000002.tmp" in said and "free some space" in said
        assert "\n" not in said and left == ["step-000001"]


def interrupted(folder: Path, gate: Path) -> list[str]:
    """What an error of the training leaves, while a writer is slow."""
    with run(folder) as (model, optimizers, checkpoints):
        checkpoints.save(1)
        gate.unlink()
        (folder / "written by 0").unlink()
        with pytest.raises(KeyError), checkpoints.during_steps():
            checkpoints.after(2)
            Timer(0.5, gate.touch).start()
            raise KeyError
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_an_error_of_the_training_drops_what_is_being_written(tmp_path: Path, slow: Path) -> None:
    """And does not wait for all of it."""
    slow.touch()
    assert run_ranks(1, interrupted, tmp_path, slow) == [["step-000001"]]
    assert slow.exists() and not (tmp_path / "written by 0").exists()


GROUPS = {"": "max", "job": "5000", "job/step": "max"}


def test_memory_left_is_what_the_kernel_and_every_group_above_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PROC", tmp_path / "proc")
    monkeypatch.setattr(saving, "CGROUP", tmp_path / "cgroup")
    assert saving.host_memory_left() == 0, "nobody tells"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   7 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/elsewhere\n0::/job/step\n")
    assert saving.host_memory_left() == 7 * 1024
    for group, limit in GROUPS.items():
        place = tmp_path / "cgroup" / group
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text("3000\n")
        (place / "memory.stat").write_text("anon 1500\ninactive_file 1000\n")
    assert saving.host_memory_left() == 3000
