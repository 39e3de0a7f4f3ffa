"""A live view of a run, an attack, a sweep or a comparison: one screen of a terminal, from the files alone."""

import importlib.util
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from unlearn.errors import UserError
from unlearn.launch.watch.config import WatchConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from unlearn.launch.watch.look import View, Watcher

WIDTH = 100  # columns of a picture that goes to no terminal


def watch(config: WatchConfig) -> None:
    """Draw the folder's picture every few seconds until what is in it is finished; once where it is no terminal.

    Raises:
        UserError: the folder is none that this project writes while it works, or rich is not installed.
    """
    if importlib.util.find_spec("rich") is None:
        raise UserError("expected rich for the live view; found none: pip install 'unlearn[watch]'")
    from unlearn.launch.watch.look import Watcher

    watcher = Watcher(_folder(config.folder))
    screen = sys.stdout.isatty()
    console = _console(screen)
    if screen and not config.once and not console.is_dumb_terminal:
        _live(watcher, console, config.seconds)
    _show(console, watcher.look(time.time()), console.height if screen else 1000)


def _folder(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"expected the path of a folder; found no home folder for {path!r}: check it") from None


def _console(screen: bool) -> "Console":
    from rich.console import Console

    if screen:
        return Console(highlight=False, markup=False, emoji=False)
    return Console(width=WIDTH, force_terminal=False, color_system=None, highlight=False, markup=False, emoji=False)


def _live(watcher: "Watcher", console: "Console", seconds: float) -> None:
    """Draw again and again, on a screen of its own, which goes with the block however it ends."""
    from rich.console import Group
    from rich.live import Live

    signal.signal(signal.SIGTERM, _leave)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            view = watcher.look(time.time())
            live.update(Group(*_lines(console, view, console.height)), refresh=True)
            if ended(view):
                return
            time.sleep(seconds)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def ended(view: "View") -> bool:
    """Whether nothing more will come."""
    state = getattr(view, "state", None)
    return state is not None and state.word == "finished"


def _lines(console: "Console", view: "View", height: int) -> "list[Text]":
    from unlearn.launch.watch.draw import draw

    return draw(view, console.width, height, unicode=console.encoding.startswith("utf"))


def _show(console: "Console", view: "View", height: int) -> None:
    """Print one picture."""
    for line in _lines(console, view, height):
        console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)
