"""A run goes on with another number of ranks; ranks that differ are named; one rank's signal stops all."""

import json
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_training import prepare

from unlearn.distributed import barrier, process_group, rank
from unlearn.errors import UserError
from unlearn.optim.build import linear_schedule
from unlearn.run.checkpoint import Checkpoints
from unlearn.run.log import MetricsLog
from unlearn.run.preflight import check_ranks
from unlearn.run.stopping import StopSignals
from unlearn.trainer import train

pytestmark = pytest.mark.usefixtures("token_cache")


def go_on(home: Path, mode: str, folder: Path) -> int:
    """Run to the end from the newest checkpoint in `folder`, saving after every step; the step it went on from."""
    run = prepare(home, mode, micro_batch=2)
    folder.mkdir(exist_ok=True)
    with StopSignals(folder / "PREEMPTED") as stop, MetricsLog(folder / "metrics.jsonl", run.steps, "test") as log:
        saved = Checkpoints(folder, run.model, run.optimizers, log, steps=run.steps, every=1, keep=9, stop=stop)
        first = saved.resume().step
        schedule = linear_schedule(run.steps)
        train(
            run.model,
            run.loss,
            run.optimizers,
            steps=run.steps,
            schedule=schedule,
            log=log,
            clip=1.0,
            first=first,
            checkpoints=saved,
        )
    return first


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["lora-adamw", "full-muon", "late-retain"])
def test_another_number_of_ranks_goes_on_within_rounding(home: Path, tmp_path: Path, mode: str) -> None:
    """Saved by two ranks, continued by one and by three: the loss of every later step within 5e-7 of itself."""
    assert run_ranks(2, go_on, home, mode, tmp_path / "two") == [0, 0]
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        shutil.copytree(tmp_path / "two", folder)
        shutil.rmtree(folder / "checkpoints/step-000003")
        shutil.rmtree(folder / "checkpoints/step-000002")
        assert run_ranks(ranks, go_on, home, mode, folder) == [1] * ranks
        assert [line["step"] for line in lines(folder)] == [0, 1, 2]
        for line, expected in zip(lines(folder), lines(tmp_path / "two"), strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=5e-7, abs=5e-7)


def odd_rank(key: str) -> str:
    facts = {"code": "a", "forget corpus": "b"} | ({key: "else"} if rank() == 1 else {})
    try:
        check_ranks(facts, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


def test_the_odd_rank_is_named() -> None:
    for key in ("code", "forget corpus"):
        for said in run_ranks(3, odd_rank, key):
            assert f"the same {key} on every rank" in said and "found else on rank 1:" in said


def told(folder: Path) -> tuple[int, int, int, bool]:
    """Rank 1 alone gets a signal and its echo."""
    with StopSignals(folder / "PREEMPTED") as stop, stop.deferred():
        before = stop.agreed()
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
        after = stop.agreed()
        code = 0
        try:
            stop.leave(after, "saved")
        except SystemExit as leaving:
            code = int(str(leaving.code))
        marked = (folder / "PREEMPTED").exists()
        stop._number = 0  # or the end of the block would end this process
    return before, after, code, marked


def test_one_rank_told_stops_all_and_an_echo_is_no_second_signal(tmp_path: Path) -> None:
    assert run_ranks(2, told, tmp_path) == [(0, signal.SIGUSR1, 128 + signal.SIGUSR1, True)] * 2


def left_alone(file: Path) -> None:
    """Rank 1 dies; the other one is in a collective."""
    with process_group():
        if rank() == 1:
            os._exit(9)
        try:
            with process_group():
                barrier()
        except UserError as error:
            file.write_text(str(error))


def test_a_rank_whose_peer_is_gone_says_so_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(2, left_alone, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert said.startswith("expected all 2 ranks") and "start the same command again" in said and "\n" not in said


def block(seconds: float) -> None:
    """Wait in C++ for what never comes, as a collective does; no Python handler runs meanwhile."""
    with pytest.raises(dist.DistStoreError):
        dist.HashStore().wait(["never"], timedelta(seconds=seconds))


@pytest.mark.parametrize(("pause", "code"), [(0.05, 0), (1.2, 128 + signal.SIGTERM)])
def test_a_second_signal_ends_a_rank_that_waits(tmp_path: Path, pause: float, code: int) -> None:
    """Even one that is inside a call that no Python handler can interrupt."""
    pid = os.fork()
    if pid == 0:
        with StopSignals(tmp_path / "PREEMPTED") as stop, stop.deferred():
            (tmp_path / "ready").touch()
            block(3.0)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    time.sleep(pause)
    os.kill(pid, signal.SIGTERM)
    started = time.monotonic()
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended == (code or 128 + signal.SIGTERM)
    assert (time.monotonic() - started < 1.0) == bool(code)
