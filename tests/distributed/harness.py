"""Run a function on several gloo ranks, as forked processes of the test."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = 120.0  # seconds for all ranks together
GRACE = 5.0  # seconds for the other ranks to end by themselves once one has failed


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks at once, within a gloo process group.

    Args:
        function: may be a closure; reads its rank from `torch.distributed`. Its result must pickle.

    Returns:
        Each rank's result, by rank.

    Raises:
        Exception: what the first failing rank raised, with its traceback as a note.
        TimeoutError: the ranks did not end within `TIMEOUT`.
    """
    context = multiprocessing.get_context("fork")  # spawn imports torch again in each rank: 24 s instead of 4
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, Path(folder), function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            late = _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return _results(Path(folder), world_size, late)


def _wait(ranks: list[Any]) -> bool:
    """Wait for all ranks; once one has failed, only for a moment more. Return whether time ran out."""
    deadline = time.monotonic() + TIMEOUT
    failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.01)
    return not failed and any(process.is_alive() for process in ranks)


def _rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # first of all: OpenMP's threads did not survive the fork, and waiting for them hangs
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), TOKENIZERS_PARALLELISM="false")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    dist.barrier()  # a rank whose function is done at once would close connections that another is still making
    try:
        outcome = {"value": function(*args)}
    except BaseException as error:
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        _save(folder / f"{rank}.pickle", {"error": error, "time": time.time()}, str(error))
        os._exit(1)  # leaving the group could wait for ranks that hang
    _save(folder / f"{rank}.pickle", outcome, "a result that does not pickle")
    dist.destroy_process_group()


def _save(path: Path, outcome: dict[str, Any], text: str) -> None:
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)  # an exception may pickle, and fail only here
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        data = pickle.dumps({"error": RuntimeError(f"{text} ({error})"), "time": time.time()})
    path.with_suffix(".tmp").write_bytes(data)
    path.with_suffix(".tmp").rename(path)


def _results(folder: Path, world_size: int, late: bool) -> list[Any]:
    files = [folder / f"{rank}.pickle" for rank in range(world_size)]
    outcomes = [pickle.loads(file.read_bytes()) if file.exists() else {} for file in files]
    errors = sorted((o for o in outcomes if "error" in o), key=lambda o: o["time"])
    if errors:
        raise errors[0]["error"]
    missing = [rank for rank, outcome in enumerate(outcomes) if not outcome]
    if late:
        raise TimeoutError(f"ranks {missing} did not end within {TIMEOUT:.0f} s")
    if missing:
        raise RuntimeError(f"ranks {missing} died without a word")
    return [outcome["value"] for outcome in outcomes]
