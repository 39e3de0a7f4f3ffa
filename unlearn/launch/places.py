"""Text that is given away: without the paths of the machine that it was made on, and without secrets."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

RUN = "RUN"  # stands for the run's folder
_PATH = re.compile(r"(?<![\w:/.~}\])%-])(?:~[\w-]*)?(?:/[^\s/'\"`|,;:()\[\]{}<>=]+)+/?")
_TOKEN = re.compile(r"\bhf_\w{16,}")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def path(text: str, run: Path) -> str:
    """A path as it may be given away: relative ones as they are, others from `RUN/` on, or their last part alone."""
    place = Path(os.path.expanduser(text))
    if not place.is_absolute():  # or in the home of a user whom this machine does not have
        return place.name if text.startswith("~") else text
    for whole, root in ((place, run.absolute()), (place.resolve(), run.resolve())):
        if whole.is_relative_to(root):
            return str(RUN / whole.relative_to(root))
    return place.name or "/"


def words(text: str, run: Path) -> str:
    """A text in which every absolute path is shortened, and no token or password stands."""
    text = _PATH.sub(lambda match: path(match[0], run), text)
    return _LOGIN.sub("", _TOKEN.sub("hf_...", text))


def command(text: str, run: Path) -> str:
    """The same for a command line, whose paths may have spaces."""
    try:
        parts = shlex.split(text)
    except ValueError:
        return words(text, run)
    return shlex.join(_word(part, run) for part in parts)


def _word(text: str, run: Path) -> str:
    name, equals, value = text.partition("=")
    if equals and value.startswith(("/", "~")):
        return f"{name}={path(value, run)}"
    return path(text, run) if text.startswith(("/", "~")) else words(text, run)


def document(value: Any, run: Path) -> Any:
    """The same for all text in a JSON value."""
    if isinstance(value, dict):
        return {document(key, run): document(one, run) for key, one in value.items()}
    if isinstance(value, list):
        return [document(one, run) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~/")) and "\n" not in value:
        return path(value, run)
    return command(value, run) if value.startswith(("python ", "torchrun ", "unlearn ")) else words(value, run)
