"""`--config FILE`: flags from a TOML file, or from the config.json of a run, under those of the command line.

A file's flags become words of the command line that come before the typed ones. So every check stays where it is, and
what is typed replaces what the file says. Nothing here imports torch.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from unlearn.errors import UserError
from unlearn.flags import spelled

FLAG = "--config"
(REPEATED,) = get_args(tyro.conf.UseAppendAction[str])[1:]  # what marks the type of a flag that is given repeatedly
ATTEMPT = frozenset(("config", "overwrite", "resume"))  # in a config.json: of that attempt, not of the run


@dataclass(frozen=True, kw_only=True)
class FileFlags:
    """Flags from a file."""

    config: str | None = None
    """Read flags from a TOML file (names as here, without the dashes), a run's config.json or a run's folder. Flags
    that are typed replace those of the file."""


def with_file(
    words: Sequence[str], flags: Callable[[Sequence[str]], type[Any]], without: Collection[str] = ()
) -> list[str]:
    """The words of a command line, after those that its --config stands for.

    Args:
        flags: the flags dataclass that a command line chooses, e.g. by its --method.
        without: flags of the file to leave out, as "muon-lr": the caller sets them itself.

    Raises:
        UserError: the file is none, or a name in it is no flag of the command.
    """
    name = _named(words)
    if name is None:
        return list(words)
    values, of_run = _read(name)
    method = [] if "method" not in values else [f"--method={values['method']}"]
    known = flags([*method, *words])
    _check_names(values, known, name)
    if of_run:
        values = _chosen(values, known)
    typed = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in words if word.startswith("--")}
    typed |= {word.removeprefix("no-") for word in typed} | set(without)
    kept = {key: value for key, value in values.items() if key.replace("_", "-") not in typed}
    repeated = _repeated(known)
    return [word for key, value in kept.items() for word in _words(key, value, key in repeated, name)] + list(words)


def inlined(
    words: Sequence[str], flags: Callable[[Sequence[str]], type[Any]], without: Collection[str] = ()
) -> list[str]:
    """`with_file` without --config itself: for who keeps the words, as the file may change."""
    found = with_file(words, flags, without)
    kept = [word for before, word in zip(["", *found], found, strict=False) if FLAG not in (before, word)]
    return [word for word in kept if not word.startswith(f"{FLAG}=")]


def _named(words: Sequence[str]) -> str | None:
    """The file of --config."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{FLAG}=")]
    found += [after for word, after in zip(words, words[1:], strict=False) if word == FLAG]
    if len(found) > 1:
        raise UserError(f"expected one {FLAG}; found {len(found)}: put their flags into one file")
    return found[0] if found else None


def _read(name: str) -> tuple[dict[str, Any], bool]:
    """(values by field name; whether the file is a run's config.json)."""
    file = Path(name).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"expected a readable file for {FLAG}; found {file}: {error.strerror}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise UserError(f"expected {kind} in {file}; found a mistake in it ({error}): mend it") from None
    if not isinstance(found, dict):
        raise UserError(f"expected names and values in {file}; found a {type(found).__name__}: write a run's flags")
    values = {key.replace("-", "_"): value for key, value in found.items()}
    if file.suffix == ".json":
        values = {key: value for key, value in values.items() if key not in ATTEMPT and value is not None}
    return values, file.suffix == ".json"


def _check_names(values: dict[str, Any], known: type[Any], name: str) -> None:
    """Raise unless every name is a flag's."""
    names = {field.name for field in dataclasses.fields(known)} - {"config"}
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see --help"
            raise UserError(f"expected flags of this command in {name}; found {key.replace('_', '-')}: {hint}")


def _chosen(values: dict[str, Any], known: type[Any]) -> dict[str, Any]:
    """The values that a run's flags come from: without those that would be the same if they were not given."""
    fields = {field.name: field.default for field in dataclasses.fields(known)}
    plain = {key: _plain(value) for key, value in values.items()}
    kept = {key: value for key, value in plain.items() if value != fields[key]}
    whole = known(**kept)
    for key in list(kept):
        rest = {name: value for name, value in kept.items() if name != key}
        if fields[key] is not dataclasses.MISSING and _same(known, rest, whole):
            kept = rest
    return {key: plain[key] for key in ("method",) if key in plain} | kept  # it chose what the others are


def _same(known: type[Any], values: dict[str, Any], whole: Any) -> bool:
    """Whether these values give this configuration."""
    try:
        return bool(known(**values) == whole)
    except UserError:
        return False


def _plain(value: Any) -> Any:
    """A value of a config.json as its field has it."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if value in ("inf", "-inf") else value


def _repeated(known: type[Any]) -> set[str]:
    """Flags that are given once for each of their values."""
    hints = get_type_hints(known, include_extras=True)
    return {name for name, hint in hints.items() if REPEATED in getattr(hint, "__metadata__", ())}


def _words(key: str, value: Any, repeated: bool, name: str) -> list[str]:
    """A flag and its value as words."""
    if isinstance(value, bool):
        return [spelled(key) if value else f"--no-{key.replace('_', '-')}"]
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, str | int | float) for one in listed):
        raise UserError(
            f"expected a number, a text, true, false or a list of them for {key.replace('_', '-')} in {name}; found "
            f"{value!r}: write it as the flag takes it"
        )
    if repeated or not isinstance(value, list | tuple):
        return [f"{spelled(key)}={one}" for one in listed]
    return [spelled(key), *map(str, listed)]
