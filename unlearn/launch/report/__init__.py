"""One self-contained HTML page for a run or a sweep: verdict, accuracies, curves, what the lens reads, flags."""

import importlib.util
import sys
from pathlib import Path

from unlearn.errors import UserError
from unlearn.files import write_text
from unlearn.launch.report.config import ReportConfig


def write_report(config: ReportConfig) -> Path:
    """Write FOLDER/report.html from what stands in a run's or a sweep's folder, and return its path.

    Raises:
        UserError: the folder is neither, a file is damaged, or matplotlib or jinja2 is not installed.
    """
    from unlearn.launch.report.sweep_record import is_sweep

    folder = Path(config.folder).expanduser()
    make = _sweep_page if is_sweep(folder) else _run_page
    file = folder / "report.html"
    write_text(file, make(folder, config))
    print(f"report: {file}")
    return file


def missing_packages() -> list[str]:
    """What draws and fills a page, as far as it is not installed."""
    return [package for package in ("matplotlib", "jinja2") if importlib.util.find_spec(package) is None]


def _check_installed() -> None:
    for package in missing_packages():
        raise UserError(f"expected {package} for the report; found none: pip install 'unlearn[report]'")


def _run_page(folder: Path, config: ReportConfig) -> str:
    from unlearn.launch.report.record import read_record

    record = read_record(folder, config.evals, config.attacks)
    _check_installed()
    if config.prompts:
        from unlearn.lens_readings import write_readings  # imports torch

        write_readings(folder, record.config, config.prompts, config.device)
        record = read_record(folder, config.evals, config.attacks)
    for place in record.empty:
        print(
            f"python -m unlearn: note: expected results of evals/run.py in {place}; found none yet: report again once "
            "they are there",
            file=sys.stderr,
        )
    if not record.measured:
        print(
            f"python -m unlearn: note: {folder} was not evaluated: run evals/run.py --model {folder / 'model'} --out "
            f"{folder / 'evals'}, then report again",
            file=sys.stderr,
        )
    from unlearn.launch.report.page import render

    return render(record)


def _sweep_page(folder: Path, config: ReportConfig) -> str:
    from unlearn.launch.report.sweep_record import read_sweep

    if config.prompts:
        raise UserError(f"--prompts has no effect on {folder}, a sweep: give the folder of one of its runs")
    sweep = read_sweep(folder, config.evals, config.attacks)
    _check_installed()
    from unlearn.launch.report.sweep_page import render_sweep

    return render_sweep(sweep)
