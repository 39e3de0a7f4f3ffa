"""Which point of a sweep to try next: from the states of the trials so far to the next point, and nothing else.

Everything here is a pure function of the trials, so a sweep that was killed goes on exactly where it was.

The boundary search works on three observations of everyone who has tuned an unlearning run by hand. Pushed harder, a
model loses the hazard domain and then everything else: along one coefficient the two accuracies fall one after the
other, and between "hazard still high" and "general already low" one can bisect, in log space. Where both are partly
down, no push helps: less brings the hazard back, more takes the rest. And more retaining, or a gentler learning rate,
moves the two falls apart, but asks for a harder push.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from unlearn.evals.judge.targets import parse_target

State = Literal["push harder", "push less", "gentler", "failed", "met"]
End = Literal["too rough", "too gentle"]
Values = tuple[tuple[str, str], ...]  # (flag, value as typed), in the order of --grid

PUSH = ("remove-coef", "muon-lr", "adam-lr")  # what the search bisects: the first of them that varies
GENTLER_UP, GENTLER_DOWN = ("retain-coef",), ("muon-lr", "adam-lr")
RESOLUTION = 1.2  # two pushes closer than this factor are one


@dataclass(frozen=True)
class Outcome:
    """What one trial said."""

    values: Values
    seed: int
    state: State


@dataclass(frozen=True)
class Space:
    """The points of a sweep.

    Attributes:
        flags: values of each flag, as typed.
        push: the flag to bisect between its least and largest value; None for the plain grid.
        seeds: how many seeds have to meet the target at a point, from `first_seed` on.
    """

    flags: Mapping[str, tuple[str, ...]]
    push: str | None = None
    seeds: int = 3
    first_seed: int = 0

    def points(self) -> list[Values]:
        """All combinations of the values given, the last flag moving fastest."""
        return [tuple(zip(self.flags, values, strict=True)) for values in product(*self.flags.values())]

    def settings(self) -> list[Values]:
        """All combinations of the flags beside `push`."""
        others = {flag: values for flag, values in self.flags.items() if flag != self.push}
        return [tuple(zip(others, values, strict=True)) for values in product(*others.values())]

    def ends(self) -> tuple[float, float]:
        """The least and the largest push."""
        assert self.push is not None
        numbers = [float(value) for value in self.flags[self.push]]
        return min(numbers), max(numbers)

    def split(self, values: Values) -> tuple[Values, float]:
        """A point as (setting, push)."""
        return tuple(pair for pair in values if pair[0] != self.push), float(dict(values)[self.push or ""])

    def join(self, setting: Values, push: float) -> Values:
        """The point of a setting and a push, which is rounded to three digits."""
        found = dict(setting) | {self.push: f"{push:.3g}"}
        return tuple((flag, found[flag]) for flag in self.flags)


def classify(verdict: Mapping[str, Any]) -> State:
    """What a verdict of `unlearn.evals.judge.verdict.judge` asks for next, by point estimates.

    Hazard high, general kept: push harder. Hazard low, general lost: push less. Both partly down, or the hazard low by
    collapse alone: gentler. A collapse is never "met".
    """
    if verdict["by_point"] == "met":
        return "met"
    holds = {"<=": True, ">=": True}
    for one in verdict["targets"]:
        target = parse_target(one["target"])
        holds[target.operator] &= target.holds(one["acc"])
    if holds["<="] and not holds[">="]:
        return "push less"
    return "push harder" if holds[">="] and not holds["<="] else "gentler"


def confirmed(space: Space, trials: Iterable[Outcome]) -> Values | None:
    """The first point that met the target with every seed; None so far."""
    counts: dict[Values, int] = {}
    for trial in trials:
        if trial.state == "met":
            counts[trial.values] = counts.get(trial.values, 0) + 1
            if counts[trial.values] == space.seeds:
                return trial.values
    return None


def next_point(space: Space, trials: Sequence[Outcome]) -> tuple[Values, int] | None:
    """The point to try next and its seed; None when there is nothing left to try."""
    states: dict[Values, State] = {}
    tried: dict[Values, int] = {}
    for trial in trials:
        tried[trial.values] = tried.get(trial.values, 0) + 1
        if states.get(trial.values, "met") == "met":  # one seed that misses speaks for the point
            states[trial.values] = trial.state
    for values, state in states.items():
        if state == "met" and tried[values] < space.seeds:
            return values, space.first_seed + tried[values]
    if space.push is None:
        found = next((values for values in space.points() if values not in states), None)
    else:
        found = _next_on_boundary(space, states)
    return None if found is None else (found, space.first_seed)


def _next_on_boundary(space: Space, states: Mapping[Values, State]) -> Values | None:
    """Finish the setting under work; then the untried one whose outcome will rule out most others; then the rest."""
    pushes: dict[Values, dict[float, State]] = {setting: {} for setting in space.settings()}
    last = math.sqrt(math.prod(space.ends()))
    for values, state in states.items():
        setting, last = space.split(values)
        pushes[setting][last] = state
    ended: dict[Values, End] = {}
    for setting, found in pushes.items():
        step = _bisect(space, found)
        if found and isinstance(step, float):
            return space.join(setting, step)
        if found and not isinstance(step, float):
            ended[setting] = step
    left = [setting for setting in pushes if setting not in ended and not _ruled_out(setting, ended)]
    if left:
        return space.join(max(left, key=lambda setting: _worth(setting, left)), last)
    # The rules of thumb have left nothing: go through what they ruled out, and bisect to the end everywhere.
    for found_only in (False, True):
        for setting, found in pushes.items():
            step = _bisect(space, found, patient=True)
            if bool(found) != found_only and isinstance(step, float):
                return space.join(setting, step)
    return None


def _bisect(space: Space, found: Mapping[float, State], patient: bool = False) -> float | End:
    """The next push at one setting, or how the setting ended.

    Args:
        patient: take "gentler" and "failed" for "push less" instead of leaving the setting.
    """
    if not patient and any(state in ("gentler", "failed") for state in found.values()):
        return "too rough"
    least, most = space.ends()
    weak = [push for push, state in found.items() if state == "push harder"]
    strong = [push for push, state in found.items() if state not in ("push harder", "met")]
    low, high = max(weak, default=least), min(strong, default=most)
    if high / low >= RESOLUTION:
        return _rounded(math.sqrt(low * high))
    if not strong:
        return "too gentle" if most in found else most
    return "too rough" if weak or least in found else least


def _rounded(push: float) -> float:
    return float(f"{push:.3g}")


def _gentler(one: Values, other: Values) -> bool:
    """Whether `one` is at least as gentle as `other` in every flag."""
    for (flag, a), (_, b) in zip(one, other, strict=True):
        up, down = flag in GENTLER_UP, flag in GENTLER_DOWN
        if a != b and not (up and float(a) >= float(b)) and not (down and float(a) <= float(b)):
            return False
    return True


def _ruled_out(setting: Values, ended: Mapping[Values, End]) -> bool:
    """Whether a setting that ended too rough is gentler than this one, or one too gentle rougher."""
    return any(
        _gentler(other, setting) if end == "too rough" else _gentler(setting, other) for other, end in ended.items()
    )


def _worth(setting: Values, left: Sequence[Values]) -> int:
    """How many of the settings left this one's outcome rules out, whichever it is."""
    return min(sum(_gentler(setting, other) for other in left), sum(_gentler(other, setting) for other in left))
