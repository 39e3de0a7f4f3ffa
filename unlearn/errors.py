"""How a mistake of the user's reaches the user: one sentence and a non-zero exit code."""

import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what was found and what to do."""


def run_command(name: str, command: Callable[[], None]) -> None:
    """Run a command-line `command`; turn a `UserError` into one sentence on stderr and exit code 2.

    Any other exception keeps its traceback: it is a bug of this project, and hiding it would hide the bug.

    Args:
        name: what the sentence starts with, usually the script's name.
        command: the work, without arguments.

    Raises:
        SystemExit: 2 after a `UserError`, 130 after Ctrl-C.
    """
    try:
        command()
    except UserError as error:
        _say_once(f"{name}: error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _say_once(f"{name}: interrupted")
        raise SystemExit(130) from None


def _say_once(sentence: str) -> None:
    """Print `sentence` from one rank only, where every rank met the same mistake.

    torchrun ends the other ranks as soon as the first one has failed, so ranks above 0 wait a moment: they speak
    only if rank 0 did not fail.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(3.0)
    print(sentence, file=sys.stderr, flush=True)
