"""A picture of a view that fits its terminal."""

import time

from rich.text import Text

from unlearn.launch.watch.attack import AttackView
from unlearn.launch.watch.comparison import ComparisonView
from unlearn.launch.watch.draw_attack import draw_attack
from unlearn.launch.watch.draw_run import draw_run, title
from unlearn.launch.watch.draw_sweep import draw_comparison, draw_sweep
from unlearn.launch.watch.look import Nothing, View
from unlearn.launch.watch.run import RunView
from unlearn.launch.watch.sweep import SweepView
from unlearn.launch.watch.text import in_ascii, line


def draw(view: View, width: int, height: int, now: float | None = None, unicode: bool = True) -> list[Text]:
    """The lines of a picture, none wider than `width` and no more than `height` of them.

    Args:
        now: seconds, by which ages are told. unicode: whether the terminal has bars and sparks.
    """
    lines = _draw(view, width, height, time.time() if now is None else now)[:height]
    for found in lines:
        if not unicode:
            found.plain = in_ascii(found.plain)
        found.truncate(width, overflow="ellipsis" if unicode else "crop")
    return lines


def _draw(view: View, width: int, height: int, now: float) -> list[Text]:
    if isinstance(view, Nothing):
        return [title("nothing yet", view.folder), line("The folder has no run, or not any more; waiting for one.")]
    if isinstance(view, RunView):
        return draw_run(view, width, now)
    if isinstance(view, AttackView):
        return draw_attack(view, width, height, now)
    if isinstance(view, SweepView):
        return draw_sweep(view, width, height, now)
    assert isinstance(view, ComparisonView)
    return draw_comparison(view, width, height, now)
