"""`unlearn export`: the model of a stopped run, from one of its checkpoints."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unlearn.building import initial_values, trained_model
from unlearn.device import choose_device, describe
from unlearn.errors import UserError
from unlearn.export import write_result
from unlearn.export_config import ExportConfig
from unlearn.files import files_hash, write_json
from unlearn.model import load_tokenizer
from unlearn.precision import DTYPES
from unlearn.run.checkpoint import FOLDER, load_weights, read_progress, whole
from unlearn.run.command_line import typed_command
from unlearn.run.folder import check_output, stored_run
from unlearn.run.preflight import check_disk, code_hash, settings_hashes, versions
from unlearn.run.run import at_work
from unlearn.weights import Checkpoint, fill, shared_folder

EXPORT = ("model", "adapter", "export.json")  # what the command writes


@dataclass(frozen=True)
class Flags:
    """The flags of a run that decide what its model is; a `building.StartFlags`."""

    model: str
    revision: str | None
    fresh_weights: bool
    dtype: str
    seed: int
    lora_rank: int
    lora_alpha: float | None
    lora_dropout: float | None
    lora_targets: tuple[str, ...]
    lora_layers: tuple[int, ...]
    train: str | None
    checkpoint_activations: Literal["none"] = "none"
    compile_blocks: bool = False


def export_step(config: ExportConfig) -> Path:
    """Write the model of a run after some of its steps, to the bit as the run itself would have; return its folder.

    Raises:
        UserError: there is no such checkpoint, the run is at work, its model is not the one that it began with, or the
            output may not be written.
    """
    run = Path(config.run).expanduser()
    stored, recorded = stored_run(run)
    place, step = _chosen(run, config.step, bool(recorded["finished"]))
    flags = _flags(run, stored, config.model)
    output = config.output or str(run.absolute().with_name(f"{run.absolute().name}-{place.name}"))
    folder = check_output(output, config.overwrite, EXPORT, (str(run), flags.model))
    device = choose_device(config.device)
    _tell_device(flags, recorded, device)
    with at_work(run):
        read_progress(place, step)
        _write(flags, recorded["identity"], place, step, folder, device)
    print(f"model after {step} steps: {folder / 'model'}")
    return folder


def _chosen(run: Path, step: int | None, finished: bool) -> tuple[Path, int]:
    """The checkpoint that was asked for and its step; `UserError` if it is not there."""
    found = {int(place.name.removeprefix("step-")): place for place in whole(run / FOLDER)}
    if not found and finished:
        raise UserError(
            f"expected checkpoints in {run / FOLDER}; found a finished run, which keeps none: use {run / 'model'}"
        )
    if not found:
        raise UserError(
            f"expected checkpoints in {run / FOLDER}; found no whole one: start the run again, with --save-every"
        )
    if step is not None and step not in found:
        raise UserError(
            f"expected --step among {', '.join(map(str, found))}, of which there are checkpoints in {run}; found "
            f"{step}: choose one of these"
        )
    chosen = max(found) if step is None else step
    return found[chosen], chosen


def _flags(run: Path, stored: Mapping[str, Any], moved: str | None) -> Flags:
    """The flags in config.json that decide what the model is; `UserError` where they are not train.py's."""
    names = [field.name for field in dataclasses.fields(Flags) if field.default is dataclasses.MISSING]
    missing = next((name for name in names if name not in stored), None)
    if missing is not None:
        raise UserError(
            f"expected a run of train.py in {run}; found a config.json without {missing!r}: give the folder that has "
            "checkpoints/ and was --output of train.py"
        )
    values: dict[str, Any] = {
        name: tuple(stored[name]) if isinstance(stored[name], list) else stored[name] for name in names
    }
    return Flags(**(values | ({} if moved is None else {"model": moved})))


def _tell_device(flags: Flags, recorded: Mapping[str, Any], device: torch.device) -> None:
    """Warn where adapters are multiplied on another device than the run's, which may round otherwise."""
    before = (recorded["attempts"] or [{}])[-1].get("device")
    if flags.lora_rank > 0 and before != describe(device):
        print(
            f"warning: expected {before}, the run's device, for merging the adapters; found {describe(device)}: model/ "
            "may differ from the run's own by rounding, adapter/ does not",
            file=sys.stderr,
            flush=True,
        )


def _write(
    flags: Flags, identity: Mapping[str, str], place: Path, step: int, folder: Path, device: torch.device
) -> None:
    start = _started_from(flags, identity)
    tokenizer = load_tokenizer(flags.model, revision=flags.revision)
    model = trained_model(flags, None)
    size = sum(parameter.numel() for parameter in model.parameters()) * DTYPES[flags.dtype].itemsize
    check_disk(folder, checkpoint=0, count=0, export=size)
    fill(model, start, device, initial=initial_values(flags, model))
    load_weights(place, model)
    with shared_folder(folder, replace=True) as temporary:
        write_result(model, tokenizer, temporary, flags)
        facts = {"code": code_hash(), "versions": versions(), "device": describe(device), "command": typed_command()}
        origin = {"run": place.parent.parent.absolute().name, "step": step, "identity": dict(identity)}
        write_json(temporary / "export.json", origin | facts)


def _started_from(flags: Flags, identity: Mapping[str, str]) -> Checkpoint:
    """The weights that the run began with; `UserError` if others bear their name, or none do."""
    try:
        start = Checkpoint.open(flags.model, revision=flags.revision)
    except UserError as error:
        raise UserError(f"{error}; the run began with this model: give --model where it has moved") from error
    found = {"model": files_hash(start.paths()), **settings_hashes(start.folder)}
    odd = next((name for name in found if found[name] != identity.get(name)), None)
    if odd is not None:
        raise UserError(
            f"expected the {odd} that the run began with (sha256 {str(identity.get(odd))[:12]}) in {flags.model}; "
            f"found another ({found[odd][:12]}): put it back, or give --model where it has moved"
        )
    return start
