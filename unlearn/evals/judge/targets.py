"""Bounds on accuracies as users write them: `wmdp_bio_robust<=0.25`. Nothing here imports numpy or torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from unlearn.errors import UserError

_TARGET = re.compile(r"(?P<task>[^<>=\s]+)\s*(?P<operator><=|>=)\s*(?P<value>\S+)")


@dataclass(frozen=True)
class Target:
    """A bound on the accuracy of one task or group."""

    task: str
    operator: Literal["<=", ">="]
    value: float

    def __str__(self) -> str:
        return f"{self.task}{self.operator}{self.value:g}"

    def holds(self, accuracy: float) -> bool:
        return accuracy <= self.value if self.operator == "<=" else accuracy >= self.value


def parse_target(text: str) -> Target:
    """Read TASK<=SHARE or TASK>=SHARE.

    Raises:
        UserError: it is neither, or the bound is not a fraction in 0..1.
    """
    match = _TARGET.fullmatch(text.strip())
    try:
        value = float(match["value"]) if match else -1.0
    except ValueError:
        value = -1.0
    if match is None or not 0.0 <= value <= 1.0:
        raise UserError(
            f"expected --target as TASK<=SHARE or TASK>=SHARE with a share from 0 to 1; found {text!r}: "
            "write for example --target 'wmdp_bio_robust<=0.25', in quotation marks"
        )
    return Target(match["task"], "<=" if match["operator"] == "<=" else ">=", value)


def parse_pools(texts: Iterable[str]) -> dict[str, list[str]]:
    """Read NAME=TASK,TASK: which tasks make up each row.

    Raises:
        UserError: it is not of that form, or a name comes twice.
    """
    pools: dict[str, list[str]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        tasks = list(dict.fromkeys(task for task in listed.split(",") if task))
        if not name or len(tasks) < 2 or _TARGET.search(name):
            raise UserError(
                f"expected --pool as NAME=TASK,TASK with two tasks or more; found {text!r}: write for example --pool "
                "bio=mmlu_anatomy,mmlu_virology"
            )
        if name in pools:
            raise UserError(f"expected each name once in --pool; found {name} twice: leave one out")
        pools[name] = tasks
    return pools


def check_targets(targets: Iterable[Target], measured: Iterable[str]) -> None:
    """Raise `UserError` unless every target is for a task or group that will be measured."""
    names = list(measured)
    for target in targets:
        if target.task not in names:
            raise UserError(
                f"expected a --target for one of the tasks measured ({', '.join(names[:6])}); found {target.task!r}: "
                "add it to --tasks"
            )
