"""The folder that a command fills: checked before any work, claimed before the first step, known again by the same
command when it is started again."""

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from unlearn.distributed import barrier, fail_together, from_main, is_main, world_size
from unlearn.errors import UserError
from unlearn.files import temporary_name, write_json, writing
from unlearn.run.lock import LOCK
from unlearn.run.signals import MARKER

CHECKPOINTS = "checkpoints"
RESUMABLE = frozenset(("config.json", "run.json", "metrics.jsonl", CHECKPOINTS, MARKER, LOCK))
RUN = RESUMABLE | {"model", "adapter", "evals", "lens.json", "report.html", "tracking", "hub"}
ATTACK = RESUMABLE | {"attack.json", "attack.png", "attacks"}
ONE_ATTACK = RUN | {"curve.json"}
FITTING = RESUMABLE | {"lens"}  # in a folder of its own inside a lens's, whose config.json says other things
LENS = frozenset(("params.safetensors", "params.pt", "config.json", "fit.json", "fitting", MARKER, LOCK))

# Flags that may differ between the attempts of one run: they change where things lie and how they are computed, and the
# result by no more than rounding.
FREE = frozenset(
    "output overwrite resume config track track_project device save_every keep step_timeout data_dir include_path "
    "micro_batch micro_tokens shard shard_size offload_reference checkpoint_activations compile_blocks".split()
)

Earlier = Literal["none", "unfinished", "finished"]


def check_output(
    output: str,
    overwrite: bool,
    own: Iterable[str] = RUN,
    inputs: Iterable[str | None] = (),
    *,
    resumes: bool = False,
) -> Path:
    """The folder for a command's output; raises `UserError`, without touching anything, if it may not be written.

    An earlier output is only replaced with --overwrite; a folder that holds anything else, or something that this
    command reads, never is. What else lies in the folder of a run that goes on (a job's output) stays there.

    Args:
        own: names that this command writes.
        inputs: paths that it reads.
        resumes: an earlier output is no mistake; `earlier_run` looks at it.
    """
    folder = output_folder(output)
    if not (resumes and any((place / "run.json").is_file() for place in (folder, folder / "fitting"))):
        _refuse_strangers(folder, own)
    found = {entry.name for entry in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
    if found and not overwrite and not resumes:
        raise UserError(
            f"expected a new folder for --output; found an earlier run in {output}: choose another name, "
            "or give --overwrite to replace it"
        )
    for path in inputs:
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"expected --output apart from what is read; found {path} inside it: choose another name")
    _try_writing(folder)
    return folder


def output_folder(output: str) -> Path:
    """The folder `output`, which may not be there yet; raises `UserError` where there cannot be one."""
    shown = output if len(output) <= 80 else f"{output[:77]}..."
    try:
        output.encode()
        folder = Path(output).expanduser().absolute()
        places = [place for place in (folder / CHECKPOINTS, folder, *folder.parents) if not _is_there(place)]
        missing = next((place for place in places if place.is_symlink()), None)
        nearest = next(place for place in (folder, *folder.parents) if place not in places)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # too long, a loop of links, no such user
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UserError(f"expected a folder for --output; found {reason!r} at {shown!a}: choose another name") from None
    if not output.strip():
        raise UserError("expected a folder for --output; found an empty name: give one")
    if missing is not None:
        raise UserError(
            f"expected a folder at {missing}; found a link to {os.readlink(missing)}, where there is nothing: make "
            "that folder, or remove the link"
        )
    if not nearest.is_dir():
        raise UserError(f"expected a folder for --output; found the file {nearest}: choose another name")
    return folder


def _is_there(place: Path) -> bool:
    """Whether there is something under this name; an `OSError` where that cannot be known."""
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _refuse_strangers(folder: Path, own: Iterable[str]) -> None:
    """Raise if a folder holds what its command does not write."""
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in found if name.removesuffix(".tmp").removesuffix(".old") not in own]
    if strange:
        raise UserError(
            f"expected a new folder for --output, or what this command wrote there earlier; found {strange[0]!r} in "
            f"{folder}: move it away, or choose another name"
        )


def _try_writing(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, or in the nearest folder above it that exists."""
    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass


def earlier_run(folder: Path, config: Mapping[str, Any], *, resumes: bool) -> Earlier:
    """What became of an earlier run of this very command in `folder`; `none` also where a new run replaces it.

    Args:
        config: the flags. resumes: whether such a run goes on (--resume auto).

    Raises:
        UserError: on every rank, if there is a run with other flags, and no --overwrite.
    """
    earlier: Earlier = "none"
    with fail_together():
        if is_main() and resumes:
            earlier = _look(folder, config)
    return from_main(earlier)


def _look(folder: Path, config: Mapping[str, Any]) -> Earlier:
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if {name for name in found if not name.endswith(".tmp")} <= {"run.json", MARKER, LOCK}:
        return "none"  # an earlier attempt came no further than claiming the folder
    stored, recorded = _read(folder / "config.json"), _recorded(folder)
    if stored is None or recorded is None:
        difference = "no readable config.json and run.json"
    else:
        difference = _difference(stored, as_json(config))
    if not difference and recorded is not None:
        return "finished" if recorded.get("finished") else "unfinished"
    if config["overwrite"]:
        return "none"
    raise UserError(
        f"expected a new folder for --output, or the flags of the run that is there; found an earlier run in {folder} "
        f"with {difference}: give its flags to go on with it, choose another name, or give --overwrite to replace it"
    )


def _difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The flags in which the two differ, "" if in none that matters."""
    names = [name for name in (*given, *stored) if name not in FREE and stored.get(name) != given.get(name)]
    flags = {f"--{name.replace('_', '-')} {_word(stored, name)}, not {_word(given, name)}": None for name in names}
    return "; ".join(flags)


def _word(flags: Mapping[str, Any], name: str) -> str:
    value = flags.get(name)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _recorded(folder: Path) -> dict[str, Any] | None:
    """run.json, None unless it says of a run what `claim` writes."""
    found = _read(folder / "run.json") or {}
    identity, attempts = found.get("identity"), found.get("attempts")
    whole = isinstance(identity, dict) and isinstance(attempts, list) and isinstance(found.get("finished"), bool)
    return found if whole and all(isinstance(attempt, dict) for attempt in attempts or ()) else None


def stored_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of a run, config.json, and what run.json says of it: identity, attempts, finished.

    Raises:
        UserError: there is no run in `folder`, or one of the files is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"expected a run's folder; found nothing at {folder}: check the path")
    flags, recorded = _read(folder / "config.json"), _recorded(folder)
    if flags is None or recorded is None:
        raise UserError(
            f"expected a run's folder, with config.json and run.json; found no readable "
            f"{'config.json' if flags is None else 'run.json'} in {folder}: give what was --output of train.py"
        )
    return flags, recorded


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as they stand in config.json (infinity as the word)."""
    return json.loads(json.dumps({key: "inf" if value == math.inf else value for key, value in config.items()}))


def claim(
    folder: Path,
    config: Mapping[str, Any],
    earlier: Earlier,
    identity: Mapping[str, str],
    facts: Mapping[str, Any],
    *,
    own: Iterable[str] = RUN,
) -> None:
    """Claim a folder that passed `check_output`: empty it for a new run, or go on with the unfinished one in it.

    config.json is written last and removed first: a folder that has it belongs to the run that it describes. The
    folder itself stays, as it may be a mount point. Rank 0 does it for all.

    Args:
        earlier: of `earlier_run`.
        identity: digests of what the run reads: it goes on only with the same.
        facts: what else run.json should say of this attempt, e.g. versions.
        own: names that this command writes.

    Raises:
        UserError: the unfinished run had read something else, and there is no --overwrite; or the folder is to be
            emptied and holds anything else.
    """
    with fail_together():
        if is_main():
            recorded = _same_run(folder, identity, bool(config["overwrite"])) if earlier == "unfinished" else None
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _empty(folder, own) if recorded is None else _tidy(folder, own)
            recorded = recorded or {"identity": dict(identity), "finished": False, "attempts": []}
            attempt = dict(facts) | {"ranks": world_size()}
            for before in recorded["attempts"][-1:]:
                _tell_changes(before, attempt)
            recorded["attempts"].append(attempt)
            write_json(folder / "run.json", recorded)
            write_json(folder / "config.json", as_json(config))
    barrier()


def still_stands(folder: Path, identity: Mapping[str, str], overwrite: bool) -> bool:
    """Whether the finished run in `folder` had read what there is now; False if it had not, and may be replaced.

    Raises:
        UserError: on every rank, if it had read something else, and there is no --overwrite.
    """
    same = False
    with fail_together():
        if is_main():
            same = _same_run(folder, identity, overwrite) is not None
    return from_main(same)


def _same_run(folder: Path, identity: Mapping[str, str], overwrite: bool) -> dict[str, Any] | None:
    """run.json of an earlier run if it has read the same; None if it has not, and may be replaced."""
    recorded = _recorded(folder)
    assert recorded is not None, "`earlier_run` has read it"
    before = recorded["identity"]
    odd = [key for key in identity | before if identity.get(key) != before.get(key)]
    if not odd:
        return recorded
    if overwrite:
        return None
    raise UserError(
        f"expected the {odd[0]} that the run in {folder} has read (sha256 {str(before.get(odd[0]))[:12]}); found "
        f"another ({str(identity.get(odd[0]))[:12]}): put it back, choose another --output, or give --overwrite to "
        "start anew"
    )


def _tell_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of the code, the versions and the number of ranks in which an attempt differs from the one before it."""
    old, new = (
        {"code": str(a.get("code"))[:12], "device": a.get("device"), "ranks": a.get("ranks")} | a.get("versions", {})
        for a in (before, now)
    )
    odd = [f"{key} {old.get(key)}, not {new.get(key)}" for key in new | old if old.get(key) != new.get(key)]
    if odd:
        print(
            f"warning: expected {'; '.join(odd)}, as in the attempt before: the result may differ from that of an "
            "undisturbed run",
            file=sys.stderr,
            flush=True,
        )


def _tidy(folder: Path, own: Iterable[str]) -> None:
    """Remove what an attempt that was killed left half done."""
    for name in own:
        for entry in (*folder.glob(f"{name}.*tmp"), *(folder / name).glob("*.tmp")):
            _remove(entry)


def _empty(folder: Path, own: Iterable[str]) -> None:
    _refuse_strangers(folder, own)
    (folder / "config.json").unlink(missing_ok=True)
    _remove_checkpoints(folder)
    for entry in folder.iterdir():
        if entry.name != LOCK and not (entry.name == CHECKPOINTS and entry.is_symlink()):
            _remove(entry)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _remove_checkpoints(folder: Path) -> None:
    """Remove checkpoints/; where it is a link to another disk, what is in there, while the link stays."""
    place = folder / CHECKPOINTS
    if place.is_symlink():
        for entry in place.glob("step-*"):
            _remove(entry)
    elif place.is_dir():
        os.replace(place, temporary_name(place))
        shutil.rmtree(temporary_name(place))


def record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write facts to the run's run.json. Every rank must call it."""
    with fail_together():
        if is_main():
            recorded = _read(folder / "run.json")
            assert recorded is not None, f"{folder} was claimed by `claim`"
            write_json(folder / "run.json", recorded | dict(facts))


def finish_run(folder: Path) -> None:
    """Record that the run is finished, and remove its checkpoints."""
    record(folder, {"finished": True})
    with fail_together():
        if is_main():
            _remove_checkpoints(folder)
