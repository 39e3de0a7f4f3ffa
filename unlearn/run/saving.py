"""Write the tensors of all ranks into one folder while training goes on.

Every collective is on the main thread: the ranks agree on who writes what, and each copies what it writes to host
memory; its thread then only writes files. `torch.distributed.checkpoint.async_save` does otherwise: collectives in the
thread, on a process group that must outlive it, and copies on every rank of what only one of them writes. So its
planner and its writer are used, and not it. The files are the same.
"""

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from unlearn.distributed import all_true, fail_together, gather, is_main, rank
from unlearn.errors import UserError
from unlearn.files import file_hash, write_json, writing

WRITER = "PytorchStreamWriter"  # torch's writer names itself where it hides what the operating system answered
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")

DIGESTS = "digests.json"  # sha256 of every other file of what was written

Written = Future[tuple[list[WriteResult], dict[str, str]]]


@contextmanager
def saving(folder: Path, state: Mapping[str, Tensor]) -> Iterator[Written]:
    """Write `state`, as it is now, into `folder`, which is there; all ranks enter and leave together.

    Yields:
        what this rank has written, and its digests, once it has. Within the block `state` may change: what is
        written is a copy, or written already, where there is no memory for copies. Leaving the block waits for it; an
        error ends it early.

    Raises:
        UserError: on every rank, if the operating system refuses to write on one.
    """
    planner, writer = _Planner(), dcp.FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    planner.set_up_planner(dict(state), is_coordinator=is_main())
    writer.set_up_storage_writer(is_main())
    with fail_together(), writing(folder):
        local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan(gather(local))  # on every rank the same
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[rank()])
    copied = all_true(_fits(plan), torch.device("cpu"))
    if copied:
        planner.copy(plan)
    with ThreadPoolExecutor(1) as thread:  # left when it has ended
        written: Written = thread.submit(lambda: _write(writer, plan, planner, folder))
        if not copied:
            wait([written])
        try:
            yield written
        except BaseException:
            planner.cancelled = True
            raise
        with fail_together(), _refusals(folder):
            local_results = written.result()
    results = gather(local_results)
    with fail_together(), writing(folder):
        if is_main():
            found = [of_rank for of_rank, _ in results]
            assert sum(map(len, found)) == sum(len(of_rank.items) for of_rank in plans), "a tensor has no writer"
            writer.finish(metadata, found)
            digests = {name: digest for _, of_rank in results for name, digest in of_rank.items()}
            small = [file for file in folder.iterdir() if file.name not in digests]
            write_json(folder / DIGESTS, digests | {file.name: file_hash(file) for file in small})


def _write(writer: dcp.FileSystemWriter, plan: SavePlan, planner: "_Planner", folder: Path) -> Any:
    """Write this rank's files; what torch says of them, and their digests."""
    results = writer.write_data(plan, planner).wait()
    names = {result.storage_data.relative_path for result in results}
    return results, {name: file_hash(folder / name) for name in names}


class _Planner(dcp.DefaultSavePlanner):
    """torch's own, which may hold copies of what its rank writes, and may be told to give no more."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = False
        self._copies: dict[MetadataIndex, Tensor] | None = None

    def copy(self, plan: SavePlan) -> None:
        """Take copies in host memory of what `plan` writes."""
        self._copies = {item.index: self.lookup_object(item.index).detach().to("cpu", copy=True) for item in plan.items}

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor that is to be written."""
        if self.cancelled:
            raise CancelledError
        return super().lookup_object(index) if self._copies is None else self._copies[index]


def _fits(plan: SavePlan) -> bool:
    """Whether copies of what the ranks of this node write, about as much each, take at most half of what is free."""
    size = sum(item.tensor_storage_size() or 0 for item in plan.items)
    return 2 * size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= host_memory_left()


def host_memory_left() -> int:
    """Bytes of host memory that are free, or could be, to this process; 0 where there is no /proc to tell."""
    if not (PROC / "meminfo").exists():
        return 0
    kernel = dict(line.split(":") for line in (PROC / "meminfo").read_text().splitlines())
    left = [int(kernel["MemAvailable"].split()[0]) * 1024]
    own = re.search(r"^0::/(.*)$", (PROC / "self/cgroup").read_text(), re.MULTILINE)
    innermost = CGROUP / own[1] if own else CGROUP
    for group in (innermost, *innermost.parents):  # a limit of any group above holds too
        if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
            left.append(int(limit) - taken)
    return max(0, min(left))


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Turn a refusal to write, as torch's writer tells it, into a `UserError`."""
    try:
        with writing(folder):
            yield
    except RuntimeError as error:
        if WRITER not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"expected to write {folder}; found {reason!r}: free some space") from error
