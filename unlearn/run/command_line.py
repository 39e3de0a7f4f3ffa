"""The command line of this process, in the form in which a user types it."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
