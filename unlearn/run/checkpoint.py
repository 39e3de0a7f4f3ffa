"""Checkpoints of a run: what it needs to go on after a step as if nothing had happened.

That is the trainable parameters (of a LoRA run the adapters alone), every optimizer's state, the number of steps done
and the length of the log; data order, dropout and schedules follow from (seed, step). `torch.distributed.checkpoint`
writes what each rank holds, so a run may go on with another number of ranks. A checkpoint is written to
`step-000032.tmp` while steps go on, and once all ranks have written theirs, it is synced and renamed between two steps:
what bears its final name is whole.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from unlearn.distributed import all_true, fail_together, from_main, is_main, rank, world_size
from unlearn.errors import UserError
from unlearn.files import file_hash, temporary_name, write_json
from unlearn.run.log import MetricsLog
from unlearn.run.saving import DIGESTS, Written, saving
from unlearn.run.stopping import StopSignals
from unlearn.weights import shared_folder

PROGRESS = "progress.json"
FOLDER = "checkpoints"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Progress:
    """How far a run had come.

    Attributes:
        step: optimizer steps done.
        log_bytes, seconds: length of metrics.jsonl, and seconds of work, so far.
        extra: what else the command wants to find again, as JSON.
    """

    step: int
    log_bytes: int
    seconds: float
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: saved when they are due or when the run is told to stop, the oldest removed.

    Args:
        folder: the run's folder.
        model, optimizers, log: of the run.
        steps: of the whole run; there is a checkpoint after the last one, from which the export can be done again.
        every: steps between checkpoints; 0: only when told to stop.
        keep: how many stay.
        stop: who is told.
        extra: called by every rank at each save, see `Progress`; its result must be JSON. Rank 0's counts.
        state: tensors that are written too, by name, and read back in place.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        log: MetricsLog,
        *,
        steps: int,
        every: int,
        keep: int,
        stop: StopSignals,
        extra: Callable[[], dict[str, Any]] = dict,
        state: Mapping[str, Tensor] | None = None,
    ):
        self._folder, self._model, self._optimizers, self._log = folder / FOLDER, model, optimizers, log
        self._steps, self._every, self._keep, self.stop, self._extra = steps, every, keep, stop, extra
        self._state = state or {}
        self._begun = ExitStack()  # what ends the checkpoint that is being written
        self._written: Written | None = None

    @contextmanager
    def during_steps(self) -> Iterator[None]:
        """Within the block a signal waits for the end of a step; an error in it drops what is being written."""
        with self.stop.deferred(), self._begun:
            yield

    def after(self, step: int) -> None:
        """Called by every rank when `step` optimizer steps are done.

        Raises:
            SystemExit: the run was told to stop; it is saved.
            UserError: a checkpoint could not be written; the ones before are as they were.
        """
        told = self.stop.agreed()
        if told or (self._every and (step % self._every == 0 or step == self._steps)):
            self._begin(step)
        if told or step == self._steps or (self._written is not None and all_true(self._written.done(), CPU)):
            self.settle()
        if told:
            self.stop.leave(told, f"saved after step {step} of {self._steps}; the same command goes on from there")

    def save(self, step: int) -> None:
        """Write a checkpoint and wait for it."""
        self._begin(step)
        self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written, if there is one, is whole; see `after`."""
        self._written = None
        self._begun.close()

    def _begin(self, step: int) -> None:
        self.settle()
        self._written = self._begun.enter_context(self._writing(step))

    @contextmanager
    def _writing(self, step: int) -> Iterator[Written]:
        """Write a checkpoint of this moment during the block, then remove those beyond `keep`."""
        with shared_folder(self._folder / f"step-{step:06d}") as temporary:
            extra = self._extra()
            with saving(temporary, dict(tensors(self._model, self._optimizers, self._state))) as written:
                with fail_together():
                    if is_main():
                        length, seconds = self._log.position()
                        progress = {"step": step, "log_bytes": length, "seconds": seconds, "extra": extra}
                        write_json(temporary / PROGRESS, progress | {"world_size": world_size()})
                yield written
        if is_main():
            for old in whole(self._folder)[: -self._keep]:
                remove(old)

    def resume(self) -> Progress:
        """Go back to the newest checkpoint, or to the start if there is none: model, optimizers and log.

        Raises:
            UserError: it is damaged or not of this run, or the log is shorter than it was.
        """
        folder, progress = from_main(self._newest())
        if folder is not None:
            load(folder, self._model, self._optimizers, self._state)
            if is_main():
                print(f"going on after step {progress.step} of {self._steps}, from {folder}", flush=True)
        self._log.go_back(progress.log_bytes, progress.step, progress.seconds)
        return progress

    def _newest(self) -> tuple[Path | None, Progress]:
        folders = whole(self._folder)
        if not folders:
            return None, Progress(0, 0, 0.0, {})
        return folders[-1], read_progress(folders[-1], self._steps)


def read_progress(folder: Path, steps: int) -> Progress:
    """How far the run of `steps` steps had come that left a checkpoint.

    Raises:
        UserError: progress.json is damaged, or says what cannot be.
    """
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        progress = Progress(found["step"], found["log_bytes"], found["seconds"], found["extra"])
        possible = f"step-{progress.step:06d}" == folder.name and 0 < progress.step <= steps
        possible = possible and progress.log_bytes >= 0 and progress.seconds >= 0.0 and isinstance(progress.extra, dict)
    except (OSError, ValueError, KeyError, TypeError):
        possible = False
    if not possible:
        raise UserError(
            f"expected {PROGRESS} of a whole checkpoint of {steps} steps or fewer in {folder}; found a damaged one: "
            "delete the checkpoint to go on from the one before"
        )
    return progress


def whole(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / PROGRESS).is_file()), key=lambda path: int(path.name[5:]))


def remove(folder: Path) -> None:
    """Delete a folder; killed half-way, it leaves a temporary and nothing that looks whole."""
    shutil.rmtree(temporary_name(folder), ignore_errors=True)
    if folder.exists():
        folder.rename(temporary_name(folder))
    shutil.rmtree(temporary_name(folder), ignore_errors=True)


def tensors(
    model: nn.Module, optimizers: Mapping[str, Optimizer], state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, by name: `model.<parameter>`, `<optimizer>.<state>.<parameter>` and `hooks.<name>`."""
    for name, value in (state or {}).items():
        yield f"hooks.{name}", value
    for name, parameter in _trainable(model).items():
        yield f"model.{name}", parameter.detach()
    for optimizer, built in optimizers.items():
        for name, parameter in _of(built, model).items():
            for key, value in built.state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"{optimizer} keeps a {type(value).__name__} as {key}"
                yield f"{optimizer}.{key}.{name}", value


@torch.no_grad()
def load(
    folder: Path,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Read a checkpoint into `model`, `optimizers`, whatever their state, and `state`; each rank reads what it holds.

    Raises:
        UserError: it is damaged, or of another model or other optimizers.
    """
    check_digests(folder)
    with _reading(folder) as (reader, stored):
        wanted = _weights(model)
        wanted |= {f"hooks.{name}": value for name, value in (state or {}).items()}
        states = {name: _states(name, built, model, stored) for name, built in optimizers.items()}
        for name, of_parameters in states.items():
            wanted |= {f"{name}.{key}.{p}": value for p, found in of_parameters.items() for key, value in found.items()}
        _check(folder, wanted, stored)
        _read(wanted, reader)
    for name, built in optimizers.items():
        _set_states(built, states[name], model)


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Read the trained parameters of a checkpoint into `model`, and leave the rest of it, optimizers above all, alone.

    Raises:
        UserError: it is damaged, or of another model.
    """
    check_digests(folder)
    with _reading(folder) as (reader, stored):
        wanted = _weights(model)
        _check(folder, wanted, {name: entry for name, entry in stored.items() if name.startswith("model.")})
        _read(wanted, reader)


@contextmanager
def _reading(folder: Path) -> Iterator[tuple[dcp.FileSystemReader, Mapping[str, Any]]]:
    """A checkpoint's reader, and what it stores by name; a `UserError` for what goes wrong in the block."""
    try:
        reader = dcp.FileSystemReader(folder)
        yield reader, reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, CheckpointException) as error:
        raise UserError(
            f"expected a whole checkpoint in {folder}; found {_reason(error)!r}: delete it to go on from the one before"
        ) from error


def _read(wanted: dict[str, Tensor], reader: dcp.FileSystemReader) -> None:
    """Fill the tensors from the checkpoint, on all ranks together."""
    with _alone_if_so() as alone:
        dcp.load(wanted, storage_reader=reader, no_dist=alone)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in _trainable(model).items()}


def check_digests(folder: Path) -> None:
    """Raise on every rank unless a checkpoint holds what was written; its pickles are read only after that.

    Each rank reads some of the files.
    """
    with fail_together():
        digests = _digests(folder)
        for name in sorted(digests)[rank() :: world_size()]:
            file = folder / name
            if not file.is_file() or file_hash(file) != digests[name]:
                raise UserError(
                    f"expected a whole checkpoint in {folder}; found another {name} than was written: delete it to go "
                    "on from the one before"
                )


def _digests(folder: Path) -> dict[str, str]:
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        digests = None
    if not isinstance(digests, dict) or not digests.keys() >= {PROGRESS, ".metadata"}:
        raise UserError(
            f"expected a whole checkpoint in {folder}; found no readable {DIGESTS}: delete it to go on from the one "
            "before"
        )
    return digests


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _of(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by their names in the model, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def _states(
    prefix: str, optimizer: Optimizer, model: nn.Module, stored: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Room for the stored state of every parameter: as the parameter lies where it has its shape, whole otherwise.

    AdamW makes its state in the first step only, so its own cannot be read into.
    """
    room: dict[str, dict[str, Tensor]] = {}
    keys = {name.split(".")[1] for name in stored if name.startswith(f"{prefix}.")}
    for name, parameter in _of(optimizer, model).items():
        for key in sorted(keys):
            found = stored.get(f"{prefix}.{key}.{name}")
            if isinstance(found, TensorStorageMetadata):
                dtype = found.properties.dtype
                like = found.size == parameter.shape
                empty = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(found.size, dtype=dtype)
                room.setdefault(name, {})[key] = empty
    return room


def _set_states(optimizer: Optimizer, states: Mapping[str, dict[str, Tensor]], model: nn.Module) -> None:
    """Give the states to the optimizer, whose own `load_state_dict` puts each number where it wants it."""
    numbered = {index: states[name] for index, name in enumerate(_of(optimizer, model)) if name in states}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _check(folder: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Raise unless the checkpoint holds these tensors, in these shapes, and no others."""
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name: tuple(getattr(entry, "size", ())) for name, entry in stored.items()}
    odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if odd:
        raise UserError(
            f"expected {odd[0]} of shape {shapes.get(odd[0], 'none')} in {folder}; found "
            f"{found.get(odd[0], 'none')}: the checkpoint is of another run, delete it or choose another --output"
        )


@contextmanager
def _alone_if_so() -> Iterator[bool]:
    """Whether this process is alone, which torch would warn of each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield not dist.is_initialized()


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
