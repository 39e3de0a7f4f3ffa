"""Lines of a picture: bars, sparklines, ages; whatever a file says is made harmless for a terminal."""

from collections.abc import Sequence

from rich.text import Text

from unlearn.launch.report.text import printable

SPARKS, FULL, EMPTY = "▁▂▃▄▅▆▇█", "█", "░"
PLAIN = str.maketrans(
    {**dict(zip(SPARKS, "__..--==", strict=True)), EMPTY: ".", "–": "-", "·": "|", "→": ">", "…": "~"}
)
STYLES = {"at work": "bold green", "finished": "bold cyan", "stopped": "bold red", "silent": "bold yellow"}
NONE = "–"

Part = str | tuple[str, str] | Text  # words, with a style or without


def line(*parts: Part) -> Text:
    """One line of a picture; no part can move the cursor or begin another line."""
    found = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        if isinstance(part, Text):
            found.append_text(part)
        else:
            words, style = (part, "") if isinstance(part, str) else part
            found.append(one_line(words), style)
    return found


def one_line(words: str) -> str:
    """Text without line ends, tabs and characters that have no picture."""
    return printable(" ".join(words.split()) if "\n" in words or "\t" in words or "\r" in words else words)


def in_ascii(words: str) -> str:
    """`words` for a terminal that knows no other characters; as many of them."""
    return words.translate(PLAIN).encode("ascii", "replace").decode()


def joined(parts: Sequence[str]) -> str:
    """Those parts that say something."""
    return " · ".join(part for part in parts if part)


def cell(words: str, width: int, right: bool = False) -> str:
    """`words` in exactly `width` columns."""
    found = Text(one_line(words))
    found.truncate(width, overflow="ellipsis")
    space = " " * (width - found.cell_len)
    return space + found.plain if right else found.plain + space


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """The course of a number in at most `width` characters, each the mean of its share.

    Args:
        low, high: of the scale. Default: the least and the greatest of what is drawn.
    """
    means = shares(values, width)
    if not means:
        return ""
    low, high = min(means) if low is None else low, max(means) if high is None else high
    span = high - low
    if span <= 0:
        return SPARKS[3] * len(means)
    return "".join(SPARKS[max(0, min(7, int((value - low) / span * 8)))] for value in means)


def shares(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours."""
    if width < 1 or len(values) <= width:
        return list(values) if width > 0 else []
    edges = [index * len(values) // width for index in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def bar(share: float, width: int) -> str:
    """A bar that is filled to a share of 0 to 1."""
    filled = int(max(0.0, min(1.0, share)) * width)
    return FULL * filled + EMPTY * (width - filled)


def span(seconds: float) -> str:
    """A time in words, to two units."""
    whole = int(max(0.0, min(seconds, 1e12)))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def figure(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash."""
    return NONE if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return NONE if value is None else f"{100 * value:.1f} %"
