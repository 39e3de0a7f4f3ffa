"""A stand-in for a long run, to test the scripts with: it counts, saves itself when it is told to stop, and goes on.

    torchrun ... preemptible.py --output RUN --steps N [--seconds S]

Like train.py it agrees on a signal at a step's end, rank 0 saves and leaves RUN/PREEMPTED, and a later start removes
the marker and goes on. Signals within a second of the first are its echo: torchrun forwards what Slurm may have sent to
every process already. RUN/log.jsonl gets a line a step; its `value` depends on every step before.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0.1)
    flags = parser.parse_args()
    told: list[float] = []

    def tell(_number: int, _frame: object) -> None:
        if told and time.monotonic() > told[0] + 1.0:
            os._exit(1)
        told.append(time.monotonic())

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, tell)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # without torchrun
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    run(flags, told)
    dist.destroy_process_group()


def run(flags: argparse.Namespace, told: list[float]) -> None:
    main_rank = dist.get_rank() == 0
    state_file, marker = flags.output / "state.json", flags.output / "PREEMPTED"
    flags.output.mkdir(parents=True, exist_ok=True)
    state = json.loads(state_file.read_text()) if state_file.exists() else {"step": 0, "value": 1}
    dist.barrier()
    if main_rank:
        marker.unlink(missing_ok=True)
    while state["step"] < flags.steps:
        time.sleep(flags.seconds)
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        state = {"step": state["step"] + 1, "value": (state["value"] * 31 + int(total)) % 1_000_003}
        if main_rank:
            keys = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "SLURM_RESTART_COUNT", "SLURM_JOB_ID")
            line = state | {key: os.environ.get(key) for key in keys}
            with (flags.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        stop = torch.tensor(float(bool(told)))
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        if stop.item():
            if main_rank:
                state_file.write_text(json.dumps(state))
                marker.touch()
            dist.barrier()
            raise SystemExit(1)


if __name__ == "__main__":
    main()
