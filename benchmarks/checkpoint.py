"""What a checkpoint costs: the time that ranks wait for it, written while steps go on or not.

    python benchmarks/checkpoint.py [--folder WHERE] [--gib 1.0] [--repeats 5]

One process, one thread for the steps. AdamW's checkpoint of about `--gib` GiB is saved after a step, with copies and
without, in turns; between saves there are steps of matrix products. What it adds to the time without any save is told.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from unlearn.run.checkpoint import Checkpoints
from unlearn.run.log import MetricsLog
from unlearn.run.stopping import StopSignals

WIDTH, STEPS = 1024, 40
WAYS = {"no save": None, "written while steps go on": 1 << 60, "written while ranks wait": 0}


def steps(model: nn.Module, checkpoints: Checkpoints, save: bool) -> tuple[float, float]:
    """(seconds that the call which saves took, seconds of all steps and the save)."""
    weight = torch.randn(WIDTH, WIDTH)
    pause, started = 0.0, time.perf_counter()
    with checkpoints.during_steps():
        for step in range(1, STEPS + 1):
            for _ in range(3):
                weight = torch.tanh(weight @ weight)
            before = time.perf_counter()
            if save:
                checkpoints.after(STEPS + step - 1)  # due at the first of these steps only
            pause = pause or time.perf_counter() - before
    return pause, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    count = max(1, round(flags.gib * 2**30 / (3 * 4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    pauses: dict[str, list[float]] = {way: [] for way in WAYS}
    totals: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=flags.folder) as place, MetricsLog(None, 1, "benchmark") as log:
        with StopSignals(Path(place) / "PREEMPTED") as stop:
            for repeat in range(flags.repeats):
                for way, room in WAYS.items():
                    run = Path(place) / f"{repeat} {way}"
                    checkpoints = Checkpoints(
                        run, model, {"adamw": optimizer}, log, steps=2**30, every=STEPS, keep=1, stop=stop
                    )
                    with mock.patch("unlearn.run.saving.host_memory_left", return_value=room or 0):
                        pause, total = steps(model, checkpoints, room is not None)
                    shutil.rmtree(run, ignore_errors=True)
                    pauses[way].append(pause)
                    totals[way].append(total)
    alone = statistics.median(totals["no save"])
    print(f"checkpoint of {3 * 4 * WIDTH * WIDTH * count / 2**30:.2f} GiB, {STEPS} steps of {alone / STEPS:.2f} s")
    for way in list(WAYS)[1:]:
        print(
            f"{way:26} the save takes {statistics.median(pauses[way]):6.2f} s; it adds "
            f"{statistics.median(totals[way]) - alone:6.2f} s to all steps"
        )


if __name__ == "__main__":
    main()
