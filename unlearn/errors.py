"""How a mistake of the user's reaches the user: one sentence and a non-zero exit code."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

AGAIN = 1.0  # seconds until an interrupt that went astray is raised again


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what was found and what to do.

    Attributes:
        everywhere: it is known that every rank raises it.
    """

    everywhere = False


class OnEveryRank(UserError):
    """One rank's mistake, raised on all of them together."""

    everywhere = True


class NotFinite(UserError):
    """Training or a trained model came to NaN or infinity: it diverged. Raised on every rank."""

    everywhere = True


class OutOfMemory(UserError):
    """This rank's memory has run out, perhaps no other's."""


def run_command(name: str, command: Callable[[], None]) -> None:
    """Run a command-line `command`; turn a `UserError` into one sentence on stderr and exit code 2.

    Any other exception keeps its traceback: it is a bug of this project, and hiding it would hide the bug.

    Args:
        name: what the sentence starts with, usually the script's name.
        command: the work, without arguments.

    Raises:
        SystemExit: 2 after a `UserError`, 130 after Ctrl-C, 141 where nobody reads the output any more (`| head`).
    """
    rank_exit = _RankExit()
    try:
        with _CtrlC(name):
            command()
    except UserError as error:
        _say_once(f"{name}: error: {error}")
        rank_exit.code = 2
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more on its way out
        rank_exit.code = 141
        raise SystemExit(141) from None
    except SystemExit as error:
        rank_exit.code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    rank_exit.code = 0


class _RankExit:
    """How a process of torchrun's ends: after Python's own exit callbacks, before the interpreter is torn down.

    gloo's threads free the tensors of the last collectives, and take the interpreter's lock for it; a thread that asks
    for the lock during the teardown aborts the process (https://github.com/pytorch/pytorch/issues/38228), as one run
    in some hundreds did under load, with everything written. Leaving the process group does not end these threads:
    device meshes keep it.
    """

    def __init__(self) -> None:
        self.code = 1  # of an exception that nobody catches
        if "RANK" in os.environ:
            atexit.register(self._end)  # registered before the libraries' callbacks, called after them

    def _end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


class _CtrlC:
    """A context that Ctrl-C leaves with one sentence and exit code 130, whatever the code inside makes of it.

    Libraries turn a `KeyboardInterrupt` into another exception (compiled modules, while they are imported: into an
    `ImportError`) or drop it (Python itself, in a callback). So every exception after Ctrl-C is that Ctrl-C, and the
    interrupt is raised again each `AGAIN` seconds until it arrives.
    """

    def __init__(self, name: str):
        self._name, self._pressed = name, False

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {}
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else ignored, as in a background job
            for number in (signal.SIGINT, signal.SIGALRM):
                self._before[number] = signal.signal(number, self._raise)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pressed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt or (self._pressed and kind is not None):
            _say_once(f"{self._name}: interrupted")
            raise SystemExit(130) from None

    def _raise(self, number: int, frame: object) -> NoReturn:
        self._pressed = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        raise KeyboardInterrupt


def _say_once(sentence: str) -> None:
    """Print `sentence` from one rank only, where every rank met the same mistake.

    torchrun ends the other ranks as soon as the first one has failed, so ranks above 0 wait a moment: they speak
    only if rank 0 did not fail.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3.0)
    print(sentence, file=sys.stderr, flush=True)
