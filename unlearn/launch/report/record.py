"""What a run left behind, read from its files: flags, log, evaluations, attacks, lens readings."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.files import files_hash

GRID = {"points_of", "hazard", "general", "gap", "subjects"}  # in attack.json

Tasks = dict[str, dict[str, Any]]  # task, group or part of one -> acc, interval, questions, predicted, ...


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one model.

    Attributes:
        file: where it was read.
        tasks: the numbers of each task.
        verdict: what the evaluation says of its targets, if it was given any.
        details: versions and digests of the question files, where the file has them.
        members: tasks that were only measured as part of a group.
        command: what measured it, "" if that was not written down.
    """

    file: Path
    tasks: Tasks
    verdict: Any = None
    details: dict[str, Any] = field(default_factory=dict)
    members: frozenset[str] = frozenset()
    command: str = ""


@dataclass(frozen=True)
class Attack:
    """One fine-tuning attack.

    Attributes:
        config: its flags. recorded: its run.json, {} without one.
        points: accuracies by optimizer step; of the strongest, where it is a grid of attacks.
        grid: what attack.json says of all of them, on the model and its controls; {} where it is a single attack.
        members: tasks that were only measured as part of a group.
    """

    folder: Path
    config: dict[str, Any]
    points: list[tuple[int, Tasks]]
    warnings: list[str]
    members: frozenset[str]
    recorded: dict[str, Any]
    grid: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """Everything that a report shows.

    Attributes:
        config: the run's flags. recorded: its run.json, with digests and versions; {} without one.
        steps: the lines of metrics.jsonl that belong to an optimizer step.
        during: accuracies by steps done, as train.py measured them.
        before, after: of the original model and of the unlearned one.
        readings: lens.json, or None.
        finished: whether the run came to its export.
        empty: folders that should have held results.
    """

    folder: Path
    config: dict[str, Any]
    recorded: dict[str, Any]
    steps: list[dict[str, Any]]
    during: list[tuple[int, Measurement]]
    before: list[Measurement]
    after: list[Measurement]
    attacks: list[Attack]
    readings: dict[str, Any] | None
    finished: bool
    empty: list[Path]

    @property
    def measured(self) -> bool:
        """Whether anything was evaluated."""
        return bool(self.before or self.after or self.attacks or self.during)

    @property
    def members(self) -> frozenset[str]:
        """Tasks that were only measured as part of a group, e.g. the subjects of mmlu_stem."""
        during = [measurement for _, measurement in self.during]
        found: list[Measurement | Attack] = [*self.before, *self.after, *during, *self.attacks]
        return frozenset(name for one in found for name in one.members)


def read_record(folder: Path, evals: Iterable[str] = (), attacks: Iterable[str] = ()) -> Record:
    """Read a run's folder.

    Args:
        evals: further folders with results of evals/run.py. attacks: further folders of evals/tamper.py.

    Raises:
        UserError: it is not a run's folder, a file is damaged, or a result belongs to another model.
    """
    config = _read_config(folder)
    steps = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    done = steps[-1]["step"] + 1 if steps else 0
    during = sorted(
        ((_step(file), _read_summary(file, config)) for file in (folder / "evals").glob("step-*.json")), key=_first
    )
    before = [found for step, found in during if step == 0]
    after = [found for step, found in during if 0 < step == done]
    finished = (folder / "model").is_dir()
    given = {place: _results(place) for place in (Path(path).expanduser() for path in evals)}
    for files in [(folder / "evals").rglob("results_*.json"), *given.values()]:
        for file in sorted(files):
            original, found = _read_result(file, folder, config)
            (before if original else after).append(found)
    return Record(
        folder=folder,
        config=config,
        recorded=_read_if_there(folder / "run.json"),
        steps=steps,
        during=during,
        before=before,
        after=after,
        attacks=list(_read_attacks(folder, attacks)),
        readings=_read_if_there(folder / "lens.json") or None,
        finished=finished,
        empty=[place for place, files in given.items() if not files],
    )


def merged(measurements: Iterable[Measurement]) -> Tasks:
    """The tasks of several evaluations of one model; the later file counts where a task was measured twice."""
    tasks: Tasks = {}
    for measurement in measurements:
        tasks |= measurement.tasks
    return tasks


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"expected a run's or a sweep's folder; found nothing at {folder}: check the path")
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if {"model", "forget", "retain"} <= config.keys():
        return config
    if (folder / "run" / "config.json").is_file():
        raise UserError(f"expected a run's or a sweep's folder; found a trial's at {folder}: give {folder / 'run'}")
    raise UserError(
        f"expected a folder that train.py wrote, with config.json and metrics.jsonl, or a sweep's, with sweep.json; "
        f"found neither at {folder}: give a run's or a sweep's folder"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"expected JSON in {file}; found a damaged file ({error}): make it again") from error
    if not isinstance(value, dict):
        raise UserError(f"expected an object in {file}; found {type(value).__name__}: make it again")
    return value


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last one that a killed run left unfinished is passed over."""
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"expected JSON on every line of {file}; found none on line {number}: mend it") from error
    return lines


def _step(file: Path) -> int:
    number = file.stem.removeprefix("step-")
    if not number.isdigit():
        raise UserError(f"expected evaluations named step-NUMBER.json; found {file}: move it away")
    return int(number)


def _first(pair: tuple[int, Measurement]) -> int:
    return pair[0]


def _read_summary(file: Path, config: dict[str, Any]) -> Measurement:
    """An evaluation that train.py made: the numbers of each task, with or without a verdict beside them."""
    value = read_json(file)
    tasks = value.get("summary", value)
    return Measurement(file, _checked(tasks, file), value.get("verdict"), members=_not_asked(tasks, config))


def _not_asked(tasks: Iterable[str], config: dict[str, Any]) -> frozenset[str]:
    """The tasks that --eval-tasks does not name: they belong to a group that it names."""
    asked = config.get("eval_tasks") or ()
    return frozenset(name for name in tasks if asked and name.partition("/")[0] not in asked)


def _checked(tasks: Any, file: Path) -> Tasks:
    """The entries that are accuracies; `UserError` if there are none."""
    found = {name: value for name, value in tasks.items() if isinstance(value, dict) and "acc" in value}
    if not found:
        raise UserError(f"expected accuracies in {file}; found none: evaluate again")
    return found


def _results(place: Path) -> list[Path]:
    """The results in a folder; none if the evaluation that made the folder has not come to its end."""
    if not place.is_dir():
        raise UserError(f"expected a folder that evals/run.py wrote; found none at {place}: check --evals")
    return list(place.rglob("results_*.json"))


def _read_result(file: Path, folder: Path, config: dict[str, Any]) -> tuple[bool, Measurement]:
    """(whether it is of the original model, the evaluation); `UserError` if it is of neither model."""
    from unlearn.evals.judge.foreign import own_part  # imports torch, and a sweep's --help reads no results

    value = read_json(file)
    own, name = own_part(value, file), str(value.get("model_name"))
    if not isinstance(own.get("summary"), dict):
        raise UserError(f"expected results of evals/run.py in {file}; found those of another program: evaluate again")
    original, unlearned = _same(name, config["model"]), is_model_of(name, folder)
    if not original and not unlearned:
        raise UserError(
            f"expected results of {config['model']} or of {folder / 'model'}; found those of {name} in {file}: "
            "move them away or choose other --evals"
        )
    _check_weights(own.get("model_sha256"), _digests(folder)[0 if original else 1], file)
    versions = {key: value[key] for key in ("lm_eval_version", "transformers_version") if key in value}
    details = {"versions": versions, "data": own.get("data", {}), "dtypes": own.get("dtypes", {})}
    verdict = own.get("verdict", value.get("verdict"))
    groups = value.get("group_subtasks", {})
    members = frozenset(name for children in groups.values() for name in children if name not in groups)
    command = str(own.get("command", ""))
    return original, Measurement(file, _checked(own["summary"], file), verdict, details, members, command)


def _digests(folder: Path) -> tuple[str | None, str | None]:
    """Of the weights that the run began with, and of those that it exported; None where that is not known."""
    weights = list((folder / "model").glob("*.safetensors"))
    began = _read_if_there(folder / "run.json").get("identity", {}).get("model")
    return began, files_hash(weights) if weights else None


def _check_weights(stated: str | None, actual: str | None, place: Path) -> None:
    """Raise `UserError` if something was measured on other weights than those that bear the name now."""
    if stated is not None and actual is not None and stated != actual:
        raise UserError(
            f"expected {place} to be of this run's weights (sha256 {actual[:12]}); found it to be of others "
            f"({stated[:12]}), which bore the same name: measure again, or move it away"
        )


def _same(name: str, other: str) -> bool:
    return name.rstrip("/") == other.rstrip("/") or Path(name).expanduser().resolve() == Path(other).resolve()


def is_model_of(name: str, folder: Path) -> bool:
    """Whether `name`, as another command was given it, is the model that the run in `folder` exported.

    A path relative to another working folder is known by its end.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve() == (folder / "model").resolve()
    return path.parts[-2:] == (folder.resolve().name, "model")


def _read_attacks(folder: Path, given: Iterable[str]) -> Iterable[Attack]:
    """The attacks that were named, and those beside or inside the run's folder whose target is its model."""
    chosen = [Path(path).expanduser() for path in given]
    for place in chosen:
        if not (place / "attack.json").is_file():
            raise UserError(f"expected a folder that evals/tamper.py wrote; found no attack.json in {place}")
        attack = _read_attack(place / "attack.json")
        if not is_model_of(str(attack.config.get("model")), folder):
            raise UserError(
                f"expected an attack on {folder / 'model'}; found one on {attack.config.get('model')} in {place}: "
                "choose other --attacks"
            )
        yield _of_these_weights(attack, folder)
    known = {place.resolve() for place in chosen}
    near = [*folder.resolve().parent.glob("*/attack.json"), *folder.resolve().glob("*/attack.json")]
    for file in sorted(file for file in near if file.parent not in known):
        attack = _read_attack(file)
        if is_model_of(str(attack.config.get("model")), folder):
            yield _of_these_weights(attack, folder)


def _of_these_weights(attack: Attack, folder: Path) -> Attack:
    _check_weights(attack.recorded.get("identity", {}).get("model"), _digests(folder)[1], attack.folder)
    return attack


def _read_attack(file: Path) -> Attack:
    value = read_json(file)
    points = [(point["step"], _checked(point["tasks"], file)) for point in value.get("points", ())]
    if not points:
        raise UserError(f"expected the points of an attack in {file}; found none: attack again")
    config, warnings = value.get("config", {}), list(map(str, value.get("warnings", ())))
    recorded = _read_if_there(file.parent / "run.json")
    grid = {key: value[key] for key in GRID} if GRID <= value.keys() else {}
    return Attack(file.parent, config, points, warnings, _not_asked(points[0][1], config), recorded, grid)
