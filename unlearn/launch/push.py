"""`unlearn push`: a finished run as a folder for the Hugging Face hub, and its way there."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.files import atomic_folder, files_hash, local_folder, write_json, write_text
from unlearn.launch import places
from unlearn.launch.card import card
from unlearn.launch.push_config import PushConfig
from unlearn.launch.report.record import Record, read_json, read_record
from unlearn.launch.share import Share, base_of, license_of
from unlearn.model_files import Checkpoint
from unlearn.run.folder import LENS, output_folder

MARK = "unlearn.json"  # by which a folder of this command is known again
NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # keys of JSON files that name a model
WEIGHTS = (".safetensors", ".pt")


def push(config: PushConfig) -> Path:
    """Make the folder, and send it where --repo says so; return it.

    Raises:
        UserError: the run is not finished or has not what was asked for, the folder may not be written, or the hub
            refuses.
    """
    run = Path(config.run).expanduser()
    record = read_record(run, config.evals, config.attacks)
    given = _given(record, config)
    folder = _free(config.output or str(run / "hub"), config.overwrite)
    base = base_of(record, config.base)
    results = {name: places.document(found, run) for name, found in _results(record)}
    share = Share(record, config, base, license_of(record, base), results, files_hash(_weights(given)))
    with atomic_folder(folder, replace=True) as temporary:
        _fill(temporary, given, share)
        if config.lens:
            _fill(temporary / "lens", [_lens(record) / name for name in sorted(LENS)], share)
        for name, found in results.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(temporary / name, found)
        write_text(temporary / "README.md", card(share))
        write_json(temporary / MARK, {"what": config.what, "weights": share.weights, "base": base})
    print(f"folder for the hub: {folder}")
    if config.repo is None or not _send(folder, config):
        print(f"to send it: {_by_hand(folder, config)}")
    return folder


def _given(record: Record, config: PushConfig) -> list[Path]:
    """The files of what is given away; `UserError` if the run has none, or is not finished."""
    run, lora = record.folder, bool(record.config.get("lora_rank"))
    if record.recorded.get("finished") is not True:
        raise UserError(
            f"expected a finished run in {run}; found one that has not come to its end: start its command again, or "
            f"take a checkpoint's model with `unlearn export {run}`"
        )
    if config.what == "adapter" and not lora:
        raise UserError(f"expected a LoRA run in {run} for --what adapter; found full training: leave it out")
    if config.lens:
        _lens(record)
    files = sorted(file for file in (run / config.what).glob("*") if file.is_file())
    if not _weights(files):
        raise UserError(
            f"expected weights in {run / config.what}; found none: run the command again without --no-export"
        )
    if config.what == "model":
        Checkpoint.open(str(run / config.what))  # whose files must be whole, and all there
    return files


def _weights(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.suffix in WEIGHTS]


def _lens(record: Record) -> Path:
    """The folder of the lens that the run used; `UserError` if it used none, or one of the hub."""
    name = record.config.get("lens")
    if not name:
        raise UserError(f"--lens has no effect on {record.folder}, a run without a lens: leave it out")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"expected a local lens for --lens; found {name}, which is no folder here: leave it out if it is on the "
            "hub, or start from where the run was started"
        )
    return Path(local_folder(name, "lens", "config.json"))


def _free(output: str, overwrite: bool) -> Path:
    """The folder to make; `UserError` if something else is there."""
    folder = output_folder(output)
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if found and MARK not in found:
        raise UserError(
            f"expected a new folder for --output; found {found[0]!r} in {folder}: move it away, or choose another name"
        )
    if found and not overwrite:
        raise UserError(
            f"expected a new folder for --output; found an earlier one in {folder}: choose another name, or give "
            "--overwrite to replace it"
        )
    return folder


def _results(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name in the folder, content) of each result of evals/run.py; lm-eval's samples stand in other files."""
    for stage, measurements in (("before", record.before), ("after", record.after)):
        files = [one.file for one in measurements if one.file.name.startswith("results_")]
        for number, file in enumerate(files):
            found = read_json(file)
            if "model_name_sanitized" in found:  # a path with other signs between its parts
                found["model_name_sanitized"] = places.path(str(found["model_name"]), record.folder).replace("/", "__")
            place = stage if number == 0 else f"{stage}-{number + 1}"
            yield f"results/{place}/{file.name}", found


def _fill(folder: Path, files: Iterable[Path], share: Share) -> None:
    """Put files into a folder: weights as hard links where the disk has them, the rest as copies that name no path."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not file.is_file():
            continue
        if file.suffix in WEIGHTS:
            _link(file.resolve(), folder / file.name)
        elif file.name.endswith("config.json") or file.name == "fit.json":
            write_json(folder / file.name, _without_places(read_json(file), file.name, share))
        else:
            shutil.copy2(file, folder / file.name)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(file, name)


def _without_places(found: dict[str, Any], name: str, share: Share) -> dict[str, Any]:
    """A JSON file's object with the hub's name of the base model in place of a path, and no other path."""
    run = share.record.folder
    base = share.base or places.path(str(share.record.config["model"]), run)
    if name in ("config.json", "adapter_config.json"):
        found |= {key: base for key in NAMES if key in found}
    return places.document(found, run) if name == "fit.json" else found


def _send(folder: Path, config: PushConfig) -> bool:
    """Send the folder; False where there is no network. `UserError` if the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    assert config.repo is not None
    api = HfApi()
    try:
        url = api.create_repo(config.repo, private=not config.public, exist_ok=True)
        private = bool(api.repo_info(config.repo).private)
        if not private and not config.public:
            raise UserError(
                f"expected {config.repo} to be private; found it readable for everyone: give --public if it shall be "
                f"so, or choose another --repo; {folder} is made"
            )
        api.upload_folder(
            repo_id=config.repo, folder_path=folder, commit_message=f"The {config.what} of a run, and its card"
        )
    except (hub.HfHubHTTPError, hub.LocalTokenNotFoundError, hub.HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"expected the right to write to {config.repo} on the hub; found {reason!r}: log in with `hf auth login`; "
            f"{folder} is made"
        ) from error
    except (hub.HTTPError, ConnectionError, TimeoutError) as error:
        print(f"warning: expected the Hugging Face hub; found {type(error).__name__}: nothing is sent", file=sys.stderr)
        return False
    print(f"sent to {url} ({'private' if private else 'public'})")
    return True


def _by_hand(folder: Path, config: PushConfig) -> str:
    """The command that sends the folder."""
    words = ["hf", "upload", config.repo or "OWNER/NAME", str(folder)]
    return shlex.join([*words, *([] if config.public else ["--private"])])
