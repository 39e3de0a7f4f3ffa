"""A run: a command that is started, and perhaps killed, and started again with the same flags."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unlearn.device import describe
from unlearn.distributed import fail_together, is_main
from unlearn.resume_config import ResumeFlags
from unlearn.run.checkpoint import Checkpoints
from unlearn.run.command_line import typed_command
from unlearn.run.folder import (
    MARKER,
    Earlier,
    check_output,
    claim,
    earlier_run,
    finish_run,
    record,
    still_stands,
)
from unlearn.run.lock import LOCK, locked
from unlearn.run.log import MetricsLog
from unlearn.run.preflight import check_disk, check_ranks, checkpoint_bytes, code_hash, versions
from unlearn.run.stopping import StopSignals


@dataclass(frozen=True)
class Run:
    """The run in `folder`, as this start of its command goes on with it.

    Attributes:
        flags: of the command. facts: the code, the versions and the device that it runs on. own: names that it writes.
        earlier: whether an earlier attempt finished the run, or left it unfinished, going by its flags.
        stop: listens to signals. marker: what it leaves where the run is stopped.
    """

    folder: Path
    config: ResumeFlags
    flags: dict[str, Any]
    facts: dict[str, Any]
    own: frozenset[str]
    earlier: Earlier
    stop: StopSignals
    marker: Path
    device: torch.device

    def finished(self, identity: Mapping[str, str]) -> bool:
        """Whether an earlier attempt has finished the run, and had read the same: then nothing is left to do.

        Every rank must call it.

        Args:
            identity: digests of what there is to be read now.

        Raises:
            UserError: it had read something else, and there is no --overwrite.
        """
        check_ranks(identity, self.device)
        return self.earlier == "finished" and still_stands(self.folder, identity, self.config.overwrite)

    def begin(self, identity: Mapping[str, str], optimizers: Mapping[str, Optimizer], export: int) -> None:
        """Take the folder, once everything is read and before the first step; see `folder.claim`.

        Args:
            identity: digests of what was read. export: bytes of what will be written at the end.

        Raises:
            UserError: the disk is too small, or an earlier attempt read something else.
        """
        every, there = self.config.save_every, len(list(self.folder.glob("checkpoints/step-*")))
        count = max(0, self.config.keep + 1 - there) if every else 0
        check_disk(self.folder, checkpoint=checkpoint_bytes(optimizers), count=count, export=export)
        facts = self.facts | {"command": typed_command()}
        claim(self.folder, self.flags, self.earlier, identity, facts, own=self.own)
        if is_main():
            self.marker.unlink(missing_ok=True)

    def checkpoints(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        log: MetricsLog,
        steps: int,
        **more: Any,
    ) -> Checkpoints:
        """See `Checkpoints`, which is given `more`."""
        every, keep = self.config.save_every, self.config.keep
        return Checkpoints(
            self.folder, model, optimizers, log, steps=steps, every=every, keep=keep, stop=self.stop, **more
        )

    def record(self, facts: Mapping[str, Any]) -> None:
        """Write facts to run.json. Every rank must call it."""
        record(self.folder, facts)

    def finish(self) -> None:
        """Everything is written."""
        finish_run(self.folder)


@contextmanager
def opened_run(
    config: Any,
    output: str,
    own: Iterable[str],
    inputs: Iterable[str | None],
    device: torch.device,
    marker: Path | None = None,
) -> Iterator[Run]:
    """Look at the output folder and at the other ranks, and listen to signals for the length of the block.

    Args:
        config: the command's flags, a dataclass that is a `ResumeFlags`.
        own, inputs: see `check_output`.
        marker: by default in the output folder, which is then held against a second start; who gives another one holds
            that one's folder.

    Raises:
        UserError: the folder is not for this run, or ranks run different code, versions or flags.
    """
    folder = check_output(output, config.overwrite, own, inputs, resumes=config.resumes)
    flags, facts = dataclasses.asdict(config), {"code": code_hash(), "versions": versions()}
    check_ranks(facts | {"flags": flags, "device": device.type}, device)
    facts["device"] = describe(device)
    with nullcontext() if marker else at_work(folder):
        earlier = earlier_run(folder, flags, resumes=config.resumes)
        if earlier == "finished":
            finish_run(folder)  # which that attempt may not have come to the end of
        marker = marker or folder / MARKER
        with StopSignals(marker) as stop:
            yield Run(folder, config, flags, facts, frozenset(own), earlier, stop, marker, device)


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Hold a run's folder against a second start, for the length of the block; rank 0 does it for all.

    Raises:
        UserError: on every rank, if another start is at work there.
    """
    with ExitStack() as stack:
        with fail_together():
            if is_main():
                stack.enter_context(locked(folder / LOCK, "run"))
        yield
