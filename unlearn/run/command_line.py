"""The command line of this process, in the form in which a user types it."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def typed_command() -> str:
    """From the repository's folder, with torchrun before it where there are several ranks."""
    program = Path(sys.argv[0]).resolve()
    if program.name == "__main__.py":
        start = ["python", "-m", program.parent.name]
    else:
        inside = program.is_relative_to(ROOT)
        start = ["python", str(program.relative_to(ROOT)) if inside else sys.argv[0]]
    ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks > 1:
        nodes = ["--nnodes", str(ranks // local)] if ranks > local else []
        launcher = ["torchrun", *nodes, "--nproc_per_node", str(local)]
        start = [*launcher, *start[1:]]
    return shlex.join([*start, *sys.argv[1:]])
