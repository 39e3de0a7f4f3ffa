"""A comparison as its files show it: how far each method and each control is, and what is at work."""

from dataclasses import dataclass
from pathlib import Path

from unlearn.errors import UserError
from unlearn.launch.watch.attack import AttackReader
from unlearn.launch.watch.files import Objects, count, evaluated, items, latest, names, table, written
from unlearn.launch.watch.run import RunReader
from unlearn.launch.watch.state import State, held, state_of
from unlearn.launch.watch.sweep import Job
from unlearn.run.tail import Object

DOES = {"train": "training", "attack": "attack", "lens": "fitting a lens", "ways": "looking in without training"}

Readers = dict[Path, RunReader | AttackReader]


@dataclass(frozen=True)
class Row:
    """How far a method or a control is.

    Attributes:
        trials, failed: those that ended, and how many of them without a number. chosen: chosen.json, {} before.
        models: seeds of the chosen setting that were begun; 1 for a control. trained: those whose training ended.
        attacks: that ended. lost: what each command that failed says.
        jobs: what was begun and has not ended.
    """

    name: str
    trials: int
    failed: int
    chosen: Object
    models: int
    trained: int
    attacks: int
    lost: list[str]
    jobs: list[Job]


@dataclass(frozen=True)
class ComparisonView:
    """What a comparison shows at one moment.

    Attributes:
        flags: comparison.json. trials: of each method, seeds: of the chosen setting; None where no file says so yet.
        attackers: names of the held-out attackers. verdict: sentences, once it has ended.
    """

    folder: Path
    flags: Object
    state: State
    methods: list[Row]
    controls: list[Row]
    trials: int | None
    seeds: int | None
    attackers: list[str]
    before: bool
    verdict: list[str]

    @property
    def jobs(self) -> list[Job]:
        """Of all rows."""
        return [job for row in (*self.methods, *self.controls) for job in row.jobs]


class ComparisonReader:
    """Reads a comparison's folder again and again."""

    def __init__(self, folder: Path, objects: Objects):
        self._folder, self._objects = folder, objects
        self._readers: Readers = {}

    def look(self, now: float) -> ComparisonView:
        """The comparison as it is now."""
        flags = self._objects.read(self._folder / "comparison.json")
        earlier, self._readers = self._readers, {}
        methods = [self._method(name, earlier, now) for name in names(self._folder / "methods")]
        controls = [self._control(name, earlier, now) for name in names(self._folder / "controls")]
        found = self._objects.read(self._folder / "compare.json")
        settings = table(found.get("comparison"))
        tried = [len(items(row.chosen.get("trials"))) for row in methods if row.chosen]
        state = self._state(bool(found) and not held(self._folder), (*methods, *controls), now)
        return ComparisonView(
            folder=self._folder,
            flags=flags,
            state=state,
            methods=methods,
            controls=controls,
            trials=max(tried, default=0) or count(settings.get("trials")),
            seeds=count(settings.get("seeds")),
            attackers=attackers_of(flags),
            before=evaluated(self._folder / "before"),
            verdict=[str(one) for one in items(found.get("verdict"))] if state.word == "finished" else [],
        )

    def _state(self, finished: bool, rows: tuple[Row, ...], now: float) -> State:
        times = [written(self._folder / "compare.json"), *(job.written for row in rows for job in row.jobs)]
        return state_of(self._folder, finished, latest(times), now)

    def _method(self, name: str, earlier: Readers, now: float) -> Row:
        folder = self._folder / "methods" / name
        places = [folder / "trials" / trial for trial in names(folder / "trials")]
        records = [self._objects.read(place / "trial.json") for place in places]
        begun = [place for place, record in zip(places, records, strict=True) if not record]
        seeds = [folder / one for one in names(folder) if one.startswith("seed-")]
        return self._row(
            name,
            [record for record in records if record],
            self._objects.read(folder / "chosen.json"),
            seeds,
            [*self._jobs(begun, earlier, now), *self._jobs(seeds, earlier, now)],
        )

    def _control(self, name: str, earlier: Readers, now: float) -> Row:
        folder = self._folder / "controls" / name
        return self._row(name, [], {}, [folder], self._jobs([folder], earlier, now))

    def _row(self, name: str, trials: list[Object], chosen: Object, models: list[Path], jobs: list[Job]) -> Row:
        attacks = [place / "attacks" / one for place in models for one in names(place / "attacks")]
        return Row(
            name=name,
            trials=len(trials),
            failed=sum("failed" in trial for trial in trials),
            chosen=chosen,
            models=len(models),
            trained=sum(self._objects.read(place / "run/run.json").get("finished") is True for place in models),
            attacks=sum((attack / "attack.json").is_file() for attack in attacks),
            lost=[_reason(place / one) for place in models for one in names(place) if one.endswith(".failed")],
            jobs=jobs,
        )

    def _jobs(self, places: list[Path], earlier: Readers, now: float) -> list[Job]:
        """The commands of these places that were begun or submitted, and neither came to their end nor failed."""
        found = []
        for place in places:
            here = names(place)
            begun = sorted({name.rpartition(".")[0] for name in here if name.endswith((".log", ".job"))})
            for log in begun:
                if f"{log}.failed" not in here and not self._ended(place, log):
                    found.append(self._job(place, log, earlier, now))
        return found

    def _ended(self, place: Path, log: str) -> bool:
        output = place / output_of(log)
        if log == "train":
            return self._objects.read(output / "run.json").get("finished") is True
        end = {"lens": "config.json", "ways": "elicit.json"}.get(log, "attack.json")
        return (output / end).is_file()

    def _job(self, place: Path, log: str, earlier: Readers, now: float) -> Job:
        parts = place.relative_to(self._folder).parts
        name = " ".join((parts[1], *parts[-1:])) if len(parts) > 2 else parts[1]
        kind, _, attacker = log.partition("-")
        what, last = f"{DOES.get(kind, kind)} {attacker}".strip(), written(place / f"{log}.log")
        if last is None:
            return Job(name, f"{what}, waiting for Slurm")
        if kind not in ("train", "attack"):
            return Job(name, what, None, last)
        output = place / output_of(log)
        make = RunReader if kind == "train" else AttackReader
        reader = self._readers[output] = earlier.get(output) or make(output, self._objects)
        view = reader.look(now)
        return Job(name, what, view, latest([last, view.state.written]))


def _reason(file: Path) -> str:
    """What failed, and why, from the file that says so."""
    try:
        return f"{file.stem} failed: {file.read_text(encoding='utf-8', errors='replace').strip()}"
    except OSError:
        return f"{file.stem} failed"


def output_of(log: str) -> str:
    """The folder that a command fills whose log bears this name, beside it."""
    if log.startswith("attack-"):
        return f"attacks/{log.removeprefix('attack-')}"
    return "run" if log == "train" else log


def attackers_of(flags: Object) -> list[str]:
    """Names of the held-out attackers, [] where the flags do not say them."""
    from unlearn.launch.compare_attackers import SETS, attacker_set, named

    given = [str(one) for one in items(flags.get("attackers"))]
    name, steps = flags.get("attacker_set"), count(flags.get("attack_steps"))
    if not given and (name not in SETS or steps is None):
        return []
    try:
        return list(named("--attackers", given or attacker_set(str(name), steps or 0)))
    except UserError:
        return []
