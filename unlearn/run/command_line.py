"""The command line of this process, in the form in which a user types it."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository's folder; without meaning where a wheel is installed
COMMANDS = {"train.py": "train", "evals/run.py": "eval", "evals/tamper.py": "attack", "evals/elicit.py": "elicit"}


def own_program() -> tuple[str, str] | None:
    """(module, command) where this process runs `python -m MODULE` or `unlearn`, the command "" where it is still among
    the flags; None where it runs a file."""
    first, _, command = sys.argv[0].rpartition(" ")  # as `unlearn.__main__` leaves it
    if Path(first).name not in ("__main__.py", "unlearn"):
        first, command = sys.argv[0], ""
    program = Path(first)
    if program.name == "unlearn":
        return "unlearn", command
    return (program.resolve().parent.name, command) if program.name == "__main__.py" else None


def program_name() -> str | None:
    """For usage lines: `unlearn train`; None for a file, whose own name will do."""
    return " ".join(own_program() or ()).strip() or None


def typed_command() -> str:
    """From the repository's folder, with torchrun before it where there are several ranks."""
    own = own_program()
    if own is not None:
        start = ["python", "-m", *(word for word in own if word)]
    else:
        program = Path(sys.argv[0]).resolve()
        start = ["python", str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else sys.argv[0]]
    ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks > 1:
        nodes = ["--nnodes", str(ranks // local)] if ranks > local else []
        launcher = ["torchrun", *nodes, "--nproc_per_node", str(local)]
        start = [*launcher, *start[1:]]
    return shlex.join([*start, *sys.argv[1:]])


def runnable(words: Sequence[str]) -> list[str]:
    """What follows `python` to run a command of this project: its file in the repository, or, where the package is
    installed without one, `-m unlearn` and the command's name."""
    if words[0] == "-m":
        return list(words)
    file = ROOT / words[0]
    return [str(file), *words[1:]] if file.is_file() else ["-m", "unlearn", COMMANDS[words[0]], *words[1:]]
