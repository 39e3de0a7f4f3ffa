"""Two evaluations side by side: what changed, how sure that is, and a figure of it.

    python evals/pair.py results/BASE results/NEW --figure compare.png

Both must have been asked the same questions; a changed question file is an error.
"""

import importlib.util
from pathlib import Path
from typing import Any

from unlearn.config import parse_flags
from unlearn.evals.pair_config import PairConfig


def main() -> None:
    config = parse_flags(PairConfig)
    from unlearn.evals.judge.paired import compare, read_record, rounding_warning, table

    base, new = read_record(config.base), read_record(config.new)
    compared = compare(base, new, margin=config.margin)
    print(table(compared))
    if warning := rounding_warning(base, new):
        print(warning)
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed (pip install 'unlearn[report]')")
        return
    draw(compared, config.figure, labels=(base.source, new.source))
    print(f"figure: {config.figure}")


def draw(compared: dict[str, dict[str, Any]], path: Path, *, labels: tuple[str, str]) -> None:
    """Draw the accuracy of both models on each task, with 95 % intervals, and the difference beside it.

    Args:
        compared: what `paired.compare` returns.
        labels: what the legend calls the two models.
    """
    from matplotlib.figure import Figure

    from unlearn.files import writing

    names = list(compared)[::-1]
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(names)), layout="constrained")
    accuracy, difference = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(names):
        one = compared[name]
        for which, color, shift in (("base", "#1b6e3c", 0.12), ("new", "#b3261e", -0.12)):
            _bar(accuracy, one[which], one[f"{which}_interval"], place + shift, color)
        _bar(difference, one["difference"], one["interval"], place, "#333333")
    for label, color in zip(labels, ("#1b6e3c", "#b3261e"), strict=True):
        accuracy.plot([], [], "o", color=color, label=label)
    accuracy.set_yticks(range(len(names)), names)
    accuracy.set(xlabel="accuracy", xlim=(0, 1), ylim=(-0.6, len(names) - 0.4))
    accuracy.legend(fontsize="x-small")
    margin = next(iter(compared.values()))["margin"]
    difference.axvline(0, color="grey", linewidth=1)
    difference.axvline(-margin, color="grey", linewidth=1, linestyle=":")
    difference.set(xlabel=f"new - base, paired (dotted: margin of {100 * margin:g} points)")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _bar(axes: Any, value: float, interval: list[float], place: float, color: str) -> None:
    """A point with its interval."""
    axes.plot(interval, [place, place], color=color, linewidth=1.5)
    axes.plot([value], [place], "o", color=color, markersize=4)
