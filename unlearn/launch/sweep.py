"""Tune until the target is met: train, evaluate, judge, choose the next setting, until verdict or budget says stop.

    python launch/sweep.py --output runs/sweep --grid muon-lr=1e-4,1e-3 remove-coef=2,3,5 retain-coef=0,0.5,1 \\
        --target 'wmdp_bio<=0.25' --target 'mmlu_stem>=0.34' -- --optimizer muon --examples 1024
    python launch/sweep.py --search boundary --trials 20 --subsample 300 --ranks 4 ...

Killed at any moment and started again by the same command it goes on where it was and repeats no finished trial. The
search is in launch/search.py, a trial in launch/trials.py.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from unlearn.errors import UserError
from unlearn.files import write_json, writing
from unlearn.launch.search import Outcome, confirmed, next_point
from unlearn.launch.sweep_config import Sweep, read_sweep
from unlearn.launch.sweep_table import best, draw_frontier, write_results
from unlearn.launch.trials import Record, Trial, measure, measure_before, read_before
from unlearn.run.lock import LOCK, locked

ALIKE = 3  # so many failures for one reason, before anything was measured, are no results but a mistake

Measure = Callable[[Sweep, Trial], Record]
Before = Callable[[Sweep], dict[str, Any]]


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    run_sweep(read_sweep())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_sweep(sweep: Sweep, run_trial: Measure = measure, run_before: Before = measure_before) -> str:
    """Run trials until the sweep ends; write the results after each.

    Args:
        run_trial, run_before: what measures a trial, and the model before any; tests put a simulation here.

    Returns:
        Why it ended, in a sentence.

    Raises:
        UserError: the folder is another sweep's or in use, or the first trials all failed for one reason.
    """
    with _claimed(sweep):
        records = read_records(sweep.folder / "trials.jsonl")
        before = run_before(sweep)
        while (outcome := _ended(sweep, records)) is None:
            found = next_point(sweep.space, _outcomes(sweep, records))
            if found is None:
                outcome = f"The target is not met: all points are tried, {len(records)} trials."
                break
            trial = Trial(len(records) + 1, *found)
            print(f"trial {trial.name}", flush=True)
            record = run_trial(sweep, trial)
            _check_inputs(sweep, records, record)
            records.append(record)
            _append(sweep.folder / "trials.jsonl", records[-1])
            print(f"  {_says(records[-1])}", flush=True)
            _prune(sweep, records)
            write_results(sweep, records, before, "The sweep is not at its end.")
        write_results(sweep, records, before, outcome)
        draw_frontier(sweep, records, before, sweep.folder / "frontier.png")
    print(f"{outcome}\nResults in {sweep.folder}: table.md, best.json, trials.jsonl")
    return outcome


def _ended(sweep: Sweep, records: Sequence[Record]) -> str | None:
    """Why the sweep ends here, in a sentence; None to go on."""
    config, outcomes = sweep.config, _outcomes(sweep, records)
    winner = confirmed(sweep.space, outcomes)
    if winner is not None and (not config.all_points or next_point(sweep.space, outcomes) is None):
        shown = " ".join(f"--{flag} {value}" for flag, value in winner)
        return (
            f"The target is met, with {config.seeds} of {config.seeds} seeds, by {shown} after {len(records)} trials."
        )
    reasons = {record.get("reason") for record in records}
    if len(records) >= ALIKE and len(reasons) == 1 and None not in reasons:
        raise UserError(
            f"expected a trial to be measured; found that all {len(records)} failed alike ({reasons.pop()}): mend that "
            "and start anew in another --output"
        )
    spent = sum(record["seconds"] for record in records) / 3600
    if config.trials is not None and len(records) >= config.trials:
        return f"The target is not met: the budget of {config.trials} trials is spent."
    if config.hours is not None and spent >= config.hours:
        return f"The target is not met: the budget of {config.hours:g} hours is spent, {len(records)} trials."
    return None


def _check_inputs(sweep: Sweep, records: Sequence[Record], record: Record) -> None:
    """Raise unless a trial has read what the model before was measured with, and what the other trials have read."""
    now = record.get("inputs", {})
    for earlier in (read_before(sweep), *(other.get("inputs", {}) for other in records)):
        odd = [key for key in earlier.keys() & now.keys() if earlier[key] != now[key]]
        if odd:
            raise UserError(
                f"expected the {min(odd)} that this sweep began with; found that trial {record['trial']} has read "
                "another: its numbers are left out, put the earlier one back, or start anew in another --output"
            )


def _outcomes(sweep: Sweep, records: Sequence[Record]) -> list[Outcome]:
    return [Outcome(tuple(record["values"].items()), record["seed"], record["state"]) for record in records]


def _says(record: Record) -> str:
    """A trial's end for the terminal."""
    if record["state"] == "failed":
        return f"failed: {record['reason']}"
    shown = ", ".join(f"{one['target']}: {one['acc']:.1%}" for one in record["verdict"]["targets"])
    return f"{shown}: {record['verdict']['by_point']}, so {record['state']}"


@contextmanager
def _claimed(sweep: Sweep) -> Iterator[None]:
    """Hold the sweep's folder, new or this very sweep's, against a second start.

    Raises:
        UserError: it is neither, or a sweep is at work in it.
    """
    folder, file = sweep.folder, sweep.folder / "sweep.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder for --output; found the file {folder}: choose another name")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not file.is_file() and set(names) - {LOCK, "sweep.json.tmp"}:
        raise UserError(f"expected a new folder or a sweep's for --output; found other files in {folder}")
    with locked(folder / LOCK, "sweep"):
        if file.is_file():
            _check_same(json.loads(file.read_text(encoding="utf-8")), sweep)
        else:
            write_json(file, sweep.identity())
        yield


def _check_same(earlier: dict[str, Any], sweep: Sweep) -> None:
    """Raise unless the folder's sweep has the same flags, but for the budget."""
    for name, now in sweep.identity().items():
        then = earlier.get(name)
        if then != now:
            shown = name if " " in name else f"--{name.replace('_', '-')}"
            raise UserError(
                f"expected {shown} {_plain(then)}, as in the sweep in {sweep.folder}; found {_plain(now)}: "
                "choose another --output"
            )


def _plain(value: Any) -> str:
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) or "nothing"


def read_records(path: Path) -> list[Record]:
    """The finished trials; a last line that a kill has cut short is taken off the file.

    Raises:
        UserError: another line is no JSON.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"expected a trial on every line of {path}; found one that is damaged ({error})") from None


def _append(path: Path, record: Record) -> None:
    """Add a line and have it on the disk before anything follows."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def _prune(sweep: Sweep, records: Sequence[Record]) -> None:
    """Remove the weights of all trials but the best, and what a failed one has saved to go on."""
    found = best(records, sweep.config.targets())
    for record in records:
        shutil.rmtree(sweep.folder / "trials" / record["trial"] / "run" / "checkpoints", ignore_errors=True)
    for record in records if not sweep.config.keep_models else ():
        if found is None or record["trial"] != found["trial"]:
            shutil.rmtree(sweep.folder / "trials" / record["trial"] / "run" / "model", ignore_errors=True)
