"""Compare methods under attack: which one removes knowledge, at what cost, and how sure that is.

    python launch/compare.py --output runs/compare --methods lens simnpo rmu --attack-text attack.jsonl \\
        --data-dir questions --dev-data-dir development --control never-seen=MODEL --trials 4 --seeds 3 \\
        -- --model MODEL --forget forget.jsonl --retain retain.jsonl --examples 1024

Each method gets the same number of trials on development questions; the chosen setting is trained anew and attacked by
attackers that tuning never saw, on the test questions. Killed at any moment and started again by the same command it
goes on where it was. The runs are in launch/compare_runs.py, what they show in launch/compare_results.py.
"""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from unlearn.errors import UserError
from unlearn.files import write_json, write_text, writing
from unlearn.launch.compare_config import Comparison, read_comparison
from unlearn.launch.compare_runs import control_names, disk_needed, measure_before, run_control, run_method
from unlearn.launch.report import missing_packages
from unlearn.launch.trials import stop_within
from unlearn.run.lock import LOCK, locked

if TYPE_CHECKING:
    from unlearn.launch.compare_read import Row, Seed

PATIENCE = 10.0  # seconds that a run has to save where it is, before it is told to stop again


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    compare(read_comparison())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def compare(comparison: Comparison) -> None:
    """Run what is missing of a comparison, and write its results.

    Raises:
        UserError: the folder is another comparison's or in use; the disk is too small; a run was told to stop.
    """
    folder = comparison.folder
    if folder.is_dir() and not (folder / "comparison.json").is_file() and set(_names(folder)) - {LOCK}:
        raise UserError(f"expected a new folder or a comparison's for --output; found other files in {folder}")
    with locked(folder / LOCK, "comparison"):
        _check_same(folder / "comparison.json", comparison.identity(), "the comparison")
        for method in comparison.config.methods:
            place = folder / "methods" / method / "method.json"
            _check_same(place, comparison.method_identity(method), f"the trials of {method}")
        _check_disk(comparison)
        before = measure_before(comparison)
        work = [partial(run_control, comparison, name) for name in control_names(comparison)]
        work += [partial(run_method, comparison, method, before) for method in comparison.config.methods]
        _together(work, comparison.config.jobs, folder)
        found = write_results(comparison)
    print("\n".join(["", *found["verdict"], *found["warnings"], "", f"Results in {folder}: table.md, compare.json"]))


def write_results(comparison: Comparison) -> dict[str, Any]:
    """Write compare.json, table.md and, where it can be drawn, report.html, of what has come to its end."""
    from unlearn.launch.compare_read import read_rows
    from unlearn.launch.compare_results import Rules, results
    from unlearn.launch.compare_table import table, verdict, warnings

    config, (methods, controls) = comparison.config, read_rows(comparison)
    rules = Rules(config.hazard, config.general, config.general_drop, config.split_by is not None)
    rows = (*methods, *controls)
    found = results(methods, controls, rules)
    found |= {"verdict": verdict(found, rules), "warnings": warnings(config)}
    found["warnings"] += [f"{row.name}: {note}" for row in rows for note in row.notes]
    found["trials"] = {row.name: row.chosen["trials"] for row in methods if row.chosen}
    found["settings"] = {row.name: row.chosen["values"] for row in methods if row.chosen}
    found["commands"] = {row.name: commands(row) for row in rows}
    found["digests"] = {row.name: [digests(seed) for seed in row.seeds] for row in rows}
    found["comparison"] = comparison.identity() | {"seeds": config.seeds, "trials": config.trials}
    write_json(comparison.folder / "compare.json", found)
    write_text(comparison.folder / "table.md", table(found, rules))
    if not missing_packages():
        from unlearn.launch.report.compare_page import render_comparison

        write_text(comparison.folder / "report.html", render_comparison(comparison.folder.name, found, rules))
    return found


def digests(seed: "Seed") -> dict[str, Any]:
    """Of everything that the training of a model and each attack on it have read."""
    return {name: file["identity"] for name, file in seed.files.items()}


def commands(row: "Row") -> list[str]:
    """The exact commands that made and attacked a row's models."""
    return [file["attempts"][-1]["command"] for seed in row.seeds for file in seed.files.values() if file["attempts"]]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _check_same(file: Path, now: dict[str, object], what: str) -> None:
    """Write what makes a folder what it is; raise if it is something else already."""
    now = json.loads(json.dumps(now))
    if not file.is_file():
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        return write_json(file, now)
    then = json.loads(file.read_text(encoding="utf-8"))
    for name in now:
        if then.get(name) != now[name]:
            raise UserError(
                f"expected --{name.replace('_', '-')} {then.get(name)}, as in {what} in {file.parent}; found "
                f"{now[name]}: choose another --output"
            )


def _check_disk(comparison: Comparison) -> None:
    """Say what the disk needs, and raise if it has not got it."""
    needed = disk_needed(comparison)
    if needed is None:
        print("disk: not known, as the model is on the hub: give a local folder to know it before", flush=True)
        return
    free = shutil.disk_usage(comparison.folder).free
    print(f"disk: {needed}; {free / 1e9:,.1f} GB are free", flush=True)
    if free < needed.at_work:
        raise UserError(
            f"expected {needed.at_work / 1e9:,.1f} GB of free disk for the runs at work; found {free / 1e9:,.1f}: "
            "free some, or give fewer --jobs"
        )


def _together(work: Sequence[Callable[[], None]], jobs: int, folder: Path) -> None:
    """Do all of it, so many at a time; the first mistake, or a signal, stops what is at work in `folder`."""
    if jobs == 1:
        for one in work:
            one()
        return
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one) for one in work]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            left = set(futures)
            while left:  # a command may begin while the others are being stopped
                stop_within(folder)
                left = wait(left, timeout=PATIENCE).not_done
            raise
