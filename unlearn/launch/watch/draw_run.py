"""A run as lines: what it is, how far it has come, its losses, its last evaluation."""

import time
from pathlib import Path

from rich.text import Text

from unlearn.launch.watch.files import count, items, number, table
from unlearn.launch.watch.run import ACCURACY, RunView
from unlearn.launch.watch.state import State
from unlearn.launch.watch.text import (
    NONE,
    STYLES,
    bar,
    cell,
    figure,
    joined,
    line,
    one_line,
    percent,
    span,
    sparkline,
)
from unlearn.run.tail import Object

LABEL, VALUE = 16, 11  # columns of a name and of a number


def draw_run(view: RunView, width: int, now: float) -> list[Text]:
    """The whole picture, what matters most first."""
    head = [title(str(view.config.get("method", "run")), view.folder), what_it_is(view), state_line(view.state, now)]
    lines = [*head, *progress(view, width), line(), *losses(view, width), settings(view)]
    measured = evaluation(view, width)
    return [*lines, *([line(), *measured] if measured else [])]


def title(kind: str, folder: Path) -> Text:
    """The first line."""
    return line((kind, "bold"), " · ", (str(folder), "bold"))


def what_it_is(view: RunView) -> Text:
    """Model, what is trained, optimizer, dtype, ranks, device."""
    attempts = items(view.recorded.get("attempts"))
    return line(about(view.config, table(attempts[-1]) if attempts else {}, len(attempts)))


def about(config: Object, attempt: Object, attempts: int) -> str:
    """The same in words."""
    rank, ranks = count(config.get("lora_rank")), count(attempt.get("ranks"))
    train = config.get("train")
    trained = f"LoRA of rank {rank}" if rank else f"full, of {train}" if train else "full"
    parts = [str(config.get("model", "")), trained, str(config.get("optimizer", "")), str(config.get("dtype", ""))]
    parts.append("" if ranks is None else f"{ranks} rank{'s' * (ranks != 1)}")
    parts += [f"start {attempts}" if attempts > 1 else "", str(attempt.get("device", ""))]
    return joined(parts) if config else "reading models and texts; no step yet"


def state_line(state: State, now: float, last: str = "last line") -> Text:
    """Who is at work, and when the last line was written."""
    if state.written is None:
        when = f"no {last} yet"
    else:
        clock = time.strftime("%H:%M:%S" if now - state.written < 86400 else "%Y-%m-%d %H:%M", _local(state.written))
        when = f"{last} {clock}, {span(now - state.written)} ago"
    return line((state.word, STYLES[state.word]), f" · {when}", f" · {state.why}" if state.why else "")


def _local(seconds: float) -> time.struct_time:
    try:
        return time.localtime(seconds)
    except (OverflowError, OSError, ValueError):
        return time.gmtime(0)


def progress(view: RunView, width: int) -> list[Text]:
    """Step of steps with a bar; then rate, time left, phase."""
    share = view.done / view.total if view.total else float(view.state.word == "finished")
    total = "" if view.total is None else f" of {'at most ' if view.at_most else ''}{view.total:,}"
    words = f"step {view.done:,}{total} "
    wide = max(8, min(60, width - len(words) - 8))
    steps = line(words, (bar(share, wide), "green"), f" {100 * share:.0f} %" if view.total else "")
    return [steps, line(pace(view))]


def pace(view: RunView) -> str:
    """Time left, rate and phase in words."""
    rate = "" if view.tokens is None else f"{view.tokens:,.0f} tokens a second"
    step = "" if view.seconds is None else f"{figure(view.seconds)} s a step"
    left = "" if view.left is None else f"{span(view.left)} left"
    phase, stopped = view.last.get("phase"), view.last.get("stopped")
    parts = [f"phase {phase}" if phase else "", f"ended early by {stopped}" if stopped else ""]
    parts.append("exporting and measuring" if view.exporting else "")
    damaged = f"{view.damaged} damaged lines" if view.damaged else ""
    return joined([left, rate, step, *parts, damaged]) or "no step yet"


def losses(view: RunView, width: int) -> list[Text]:
    """Every loss and the gradient norm, now and as a sparkline."""
    found = [name for name in (*view.losses, "gradient_norm") if name in view.courses]
    return [loss(view, name, width) for name in found]


def loss(view: RunView, name: str, width: int) -> Text:
    """One of them."""
    wide = max(8, min(120, width - LABEL - VALUE - 2))
    drawn = sparkline(view.courses[name], wide)
    now = figure(number(view.last.get(name)), ".4g")
    return line(cell(name.replace("_", " "), LABEL), cell(now, VALUE), " ", (drawn, "cyan"))


def settings(view: RunView) -> Text:
    """Learning rates, speed, memory."""
    rates = [
        f"{name.removesuffix('_lr')} {figure(number(value))}" for name, value in view.last.items() if is_rate(name)
    ]
    speed = number(view.last.get("tflops_per_rank"))
    peak = number(table(view.recorded.get("cost")).get("peak_gib")) or number(view.last.get("peak_gib"))
    memory = f"memory peak {figure(peak)} GiB" if peak is not None else ""
    parts = [f"learning rate {', '.join(rates) or NONE}", "" if speed is None else f"{figure(speed)} TFLOP/s a rank"]
    return line(joined([*parts, memory]))


def is_rate(name: str) -> bool:
    """Whether a number of the log is a learning rate."""
    return name.endswith("_lr")


def evaluation(view: RunView, width: int) -> list[Text]:
    """The last evaluation: each task that was asked for, its interval, and its course where there are several."""
    if view.measured is None:
        return []
    asked = [str(task) for task in items(view.config.get("eval_tasks"))] or list(view.tasks)
    tasks = [task for task in asked if task in view.tasks] or asked
    label = max([LABEL, *(min(28, len(one_line(task)) + 1) for task in tasks)])
    lines = [line((f"accuracy after step {view.measured:,}, 95 % interval", "bold"))]
    return lines + [accuracy(view, task, label, width) for task in tasks]


def accuracy(view: RunView, task: str, label: int, width: int) -> Text:
    """A line of a task."""
    numbers, course = table(view.tasks.get(task)), view.courses.get(f"{task}{ACCURACY}", ())
    acc = number(numbers.get("acc"))
    shown = percent(acc if acc is not None else course[-1] if course else None)
    spread = f"{interval(numbers)} of {count(numbers.get('questions')) or NONE}"
    drawn = sparkline(course, max(8, width - label - 36), 0.0, 1.0) if len(course) > 1 else ""
    return line(cell(task, label), cell(shown, 8, right=True), "  ", cell(spread, 24), " ", (drawn, "magenta"))


def interval(numbers: Object) -> str:
    """[low, high] in per cent."""
    ends = [number(one) for one in items(numbers.get("interval"))]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return NONE
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def in_short(view: RunView, width: int) -> list[Text]:
    """A run in two lines, as a part of something greater."""
    steps = progress(view, 44)[0]
    return [line(steps, f" · {pace(view)}"), *(loss(view, name, width) for name in view.losses[:1])]
