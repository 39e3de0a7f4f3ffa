"""A grid over the flags of train.py, FLAG=VALUE,VALUE, as the sweep and the attack take it."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from functools import cache
from io import StringIO
from itertools import product
from typing import Any

import tyro

from unlearn.config import TrainConfig, config_of
from unlearn.errors import UserError

Point = tuple[tuple[str, str], ...]  # flags and their values as typed, without the dashes


@cache
def given(method: str) -> type[Any]:
    """The flags of a method as typed, before checks and defaults: one value of a grid is no complete run."""
    return type("Given", (config_of(method),), {"__post_init__": lambda self: None})


def read_grid(grid: Sequence[str], method: str, own: Collection[str], owner: str) -> dict[str, tuple[str, ...]]:
    """Flags and their values as typed.

    Args:
        own: flags that `owner`, as in "the sweep", sets itself.

    Raises:
        UserError: a part is no FLAG=VALUE,VALUE of train.py's flags, or repeats a flag or a value.
    """
    known = [field.name.replace("_", "-") for field in fields(config_of(method))]
    flags: dict[str, tuple[str, ...]] = {}
    for part in grid:
        flag, equals, listed = part.partition("=")
        flag, values = flag.removeprefix("--").replace("_", "-"), tuple(listed.split(","))
        if not equals or not all(value.strip() for value in values):
            raise UserError(f"expected --grid as FLAG=VALUE,VALUE; found {part!r}: write for example muon-lr=1e-4,1e-3")
        if flag in own or flag not in known:
            reason = f"{owner} sets that one itself" if flag in own else "see train.py --help"
            raise UserError(f"expected flags of train.py in --grid; found {flag!r}: {reason}")
        if flag in flags or len(set(values)) < len(values):
            raise UserError(f"expected every flag and value of --grid once; found {part!r} repeating one")
        flags[flag] = values
    return flags


def points(flags: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every combination of the values, the last flag moving fastest; one empty point of an empty grid."""
    return [tuple(zip(flags, values, strict=True)) for values in product(*flags.values())]


def typed(flags: Mapping[str, Sequence[str]], method: str) -> dict[tuple[str, str], Any]:
    """{(flag, value as typed): value in the type of its flag}; raises `UserError` for what train.py does not take."""
    return {(flag, value): _typed(flag, value, method) for flag, values in flags.items() for value in values}


def _typed(flag: str, value: str, method: str) -> Any:
    try:
        with redirect_stderr(StringIO()):
            found = tyro.cli(given(method), args=[f"--{flag}", *value.split()])
    except SystemExit:
        raise UserError(
            f"expected values of --{flag} as train.py takes them in --grid; found {value!r}: see train.py --help"
        ) from None
    return getattr(found, flag.replace("-", "_"))


def changed(point: Point, values: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """The fields that a point sets. values: of `typed`."""
    return {flag.replace("-", "_"): values[flag, value] for flag, value in point}


def at(
    point: Point, shared: Mapping[str, Any], values: Mapping[tuple[str, str], Any], method: str, **own: Any
) -> TrainConfig:
    """The configuration of a point.

    Args:
        shared: all fields as given. values: of `typed`. own: fields that its owner sets.

    Raises:
        UserError: train.py would refuse it.
    """
    try:
        return config_of(method)(**{**shared, **changed(point, values), **own})
    except UserError as error:
        if not point:
            raise
        shown = " ".join(f"--{flag} {value}" for flag, value in point)
        raise UserError(f"expected train.py to take every point of --grid; found {shown} refused: {error}") from None
