"""One self-contained HTML page for a run: verdict, accuracies, curves, what the lens reads, flags and versions."""

import importlib.util
import os
import sys
from pathlib import Path

from unlearn.errors import UserError
from unlearn.files import writing
from unlearn.report_config import ReportConfig


def write_report(config: ReportConfig) -> Path:
    """Write RUN/report.html from what stands in the run's folder, and return its path.

    Raises:
        UserError: there is no run, a file is damaged, or matplotlib is not installed.
    """
    from unlearn.report.record import read_record

    folder = Path(config.run).expanduser()
    record = read_record(folder, config.evals, config.attacks)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("expected matplotlib for the report; found none: pip install 'unlearn[report]'")
    if config.prompts:
        from unlearn.lens_readings import write_readings  # imports torch

        write_readings(folder, record.config, config.prompts)
        record = read_record(folder, config.evals, config.attacks)
    from unlearn.report.page import render

    file = folder / "report.html"
    _write(file, render(record))
    print(f"report: {file}")
    if not record.measured:
        print(
            f"python -m unlearn: note: {folder} was not evaluated: run evals/run.py --model {folder / 'model'} --out "
            f"{folder / 'evals'}, then report again",
            file=sys.stderr,
        )
    return file


def _write(file: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with writing(file):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
