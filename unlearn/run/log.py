"""What a run says while it works: one JSON line a step, and a progress bar on rank 0."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from unlearn.distributed import fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import sync, writing
from unlearn.progress import progress


class MetricsLog:
    """A context that appends JSON lines to a file and moves a progress bar; silent on ranks other than 0.

    Args:
        path: the JSONL file, or None for no file.
        steps: length of the bar. title: what stands before it.
    """

    def __init__(self, path: Path | None, steps: int, title: str):
        self._path, self._start = path if is_main() else None, time.monotonic()
        self._bar = progress(steps, title, "step", leave=True)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def position(self) -> tuple[int, float]:
        """(length of the file in bytes, once it is on disk; seconds since the start)."""
        length = 0
        if self._path is not None and self._path.exists():
            sync(self._path)
            length = self._path.stat().st_size
        return length, round(time.monotonic() - self._start, 3)

    def go_back(self, length: int, step: int, seconds: float) -> None:
        """Continue at an earlier `position`, when `step` steps were done: later lines are cut off. All ranks call this.

        Raises:
            UserError: the file is shorter than that.
        """
        self._start = time.monotonic() - seconds
        self._bar.update(step)
        with fail_together():
            if self._path is not None:
                found = self._path.stat().st_size if self._path.exists() else 0
                if found < length:
                    raise UserError(
                        f"expected {length} bytes or more in {self._path}, as when the checkpoint was made; found "
                        f"{found}: put the file back, or start anew with --overwrite --resume never"
                    )
                if found > length:
                    with writing(self._path):
                        os.truncate(self._path, length)

    def advance(self, steps: int = 1) -> None:
        """Some steps are done."""
        self._bar.update(steps)

    def write(self, values: Mapping[str, float | int | str], shown: tuple[str, ...] = ()) -> None:
        """Append one line with `seconds` since the start added; show the keys in `shown` beside the bar."""
        if not is_main():
            return
        self._bar.set_postfix({key: _short(values[key]) for key in shown if key in values}, refresh=False)
        if self._path is not None:
            line = dict(values) | {"seconds": round(time.monotonic() - self._start, 3)}
            with writing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


def _short(value: float | int | str) -> str:
    """A number beside the bar."""
    return f"{value:,.0f}" if isinstance(value, int | float) and 1e3 <= value < 1e9 else f"{value:.3g}"
