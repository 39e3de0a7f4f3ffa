"""Disturb runs of train.py at random moments, start each again with the same command, compare with undisturbed ones.

    make chaos N=100                 or:  python tests/chaos.py --cases 100 --seed 0

A case is a kind of run (LoRA or full, AdamW or Muon, 1 to 3 ranks), a disturbance and a moment, all drawn from the
seed. It passes if the run, started again, ends in the same bits (model, adapter, evaluations) and its log has every
line once, with the same numbers. Most cases fork their ranks and do what torchrun does when one of them fails, which
saves importing torch again; one of ten goes through launch/node.sh, and another one through two torchrun agents, as on
two nodes. As root, the full disk is a small tmpfs; otherwise it is a limit on the size of files.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chaos_attempt import PATIENCE, ROOT, Forked, Launched, wait

KINDS = {
    "lora-adamw": "--lora-rank 2",
    "lora-muon": "--lora-rank 2 --optimizer muon",
    "full-adamw": "",
    "full-muon": "--optimizer muon",
}
FAULTS = ("kill", "kill", "kill", "kill", "term", "usr1", "twice", "stop", "disk")
FAULTS_OF_TWO_NODES = ("node", "node", "kill", "usr1")  # a node: an agent and its rank
MOMENTS = ("any", "any", "saving", "saving", "exporting", "evaluating")
STEPS, SAVE_EVERY = 8, 2
STEP_TIMEOUT = 10  # seconds, after which the others give up a stopped rank
SOON = 45.0  # seconds within which the rest of an attempt ends, of which a rank or a node was killed


@dataclass(frozen=True)
class Case:
    """One disturbed run."""

    number: int
    kind: str
    ranks: int
    fault: str
    moment: str
    share: float  # of the duration of an undisturbed run, for the moment `any`
    rank: int
    how: Literal["forked", "torchrun", "agents"] = "forked"

    @classmethod
    def draw(cls, seed: int, number: int) -> "Case":
        rng = random.Random(f"{seed}/{number}")
        agents = number % 10 == 4
        ranks = 2 if agents else rng.randint(1, 3)
        return cls(
            number,
            rng.choice(list(KINDS)),
            ranks,
            rng.choice(FAULTS_OF_TWO_NODES if agents else FAULTS),
            rng.choice(MOMENTS),
            rng.uniform(0.0, 1.0),
            rng.randrange(ranks),
            "agents" if agents else "torchrun" if number % 10 == 9 else "forked",
        )

    def start(self, words: list[str], log: Path, file_limit: int | None = None) -> Forked | Launched:
        """Start the command `words`."""
        if self.how == "forked" or file_limit is not None:
            return Forked(words, self.ranks, log, file_limit)
        return Launched(words, self.ranks, log, nodes=2 if self.how == "agents" else 1)


# Named sets of cases, for the tests: the disturbances that bite most; two torchrun agents, undisturbed, then the host
# of their store killed, the other one, a rank, and both told to stop.
SETS = {
    "short": [
        Case(0, "full-adamw", 2, "kill", "saving", 0.5, 1),
        Case(1, "full-adamw", 2, "usr1", "any", 0.7, 0),
        Case(2, "lora-muon", 1, "kill", "exporting", 0.5, 0),
        Case(3, "lora-muon", 1, "disk", "saving", 0.3, 0),
    ],
    "two-nodes": [
        Case(4, "lora-adamw", 2, "none", "exporting", 0.5, 0, "agents"),
        Case(5, "lora-adamw", 2, "node", "evaluating", 0.5, 0, "agents"),
        Case(6, "lora-adamw", 2, "node", "saving", 0.7, 1, "agents"),
        Case(7, "lora-adamw", 2, "kill", "any", 0.7, 1, "agents"),
        Case(8, "lora-adamw", 2, "usr1", "any", 0.7, 0, "agents"),
    ],
}


def prepare(place: Path) -> None:
    """A tiny model, lens, corpora and questions in `place`, and everything imported that a run imports."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import tiny_tokenizer, write_home
    from evals_support import question, write_wmdp

    import train  # noqa: F401
    import unlearn.assemble  # noqa: F401
    import unlearn.evals.evaluation  # noqa: F401
    import unlearn.evals.judge.summary  # noqa: F401
    import unlearn.run.run  # noqa: F401

    if not (place / "model").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        write_home(place, tiny_tokenizer())
        write_wmdp(place / "data", [question(index, answer=index % 4, said=None) for index in range(12)])


def command(place: Path, kind: str, output: Path) -> list[str]:
    paths = f"--model {place}/model --lens {place}/lens --forget {place}/forget.jsonl --retain {place}/retain.jsonl"
    sizes = f"--layers 1 3 4 --seq-len 24 --batch 6 --micro-batch 2 --examples {6 * STEPS - 3} --dtype fp32"
    questions = f"--eval-tasks wmdp_bio --eval-every 2 --data-dir {place}/data"
    saving = f"--save-every {SAVE_EVERY} --keep 2 --step-timeout {STEP_TIMEOUT}"
    return f"train.py {paths} {sizes} {questions} {saving} {KINDS[kind]} --output {output}".split()


def result(run: Path) -> dict[str, Any]:
    """What a run ends in: the digest of every file that it leaves, and its log without times."""
    files = [file for name in ("model", "adapter", "evals") for file in sorted((run / name).rglob("*"))]
    found: dict[str, Any] = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["log"] = [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "tflops_per_rank", "peak_gib")}
        for line in lines
    ]
    return found


def check(run: Path, expected: dict[str, Any]) -> str:
    """What is wrong with a finished run, "" if nothing is."""
    left = sorted(path.name for path in run.iterdir())
    clean = {"adapter", "config.json", "evals", "metrics.jsonl", "model", "run.json"}
    if not set(left) <= clean:
        return f"left behind: {sorted(set(left) - clean)}"
    found = result(run)
    steps = [line["step"] for line in found["log"] if "loss" in line]
    if steps != list(range(STEPS)):
        return f"steps in the log: {steps}"
    odd = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    return f"differs in {', '.join(sorted(odd))}" if odd else ""


def phase(run: Path) -> str:
    """What a run is doing, as far as its folder tells."""
    if not (run / "metrics.jsonl").exists():
        return "loading"
    if any(run.glob("checkpoints/*.tmp")):
        return "saving"
    if (run / "model.tmp").exists() or (run / "adapter.tmp").exists():
        return "exporting"
    if (run / "model").exists():
        return "last evaluation"
    done = _steps(run)
    due = done % 2 == 0 and done < STEPS and not (run / f"evals/step-{done:06d}.json").exists()
    return "evaluating" if due and (run / f"checkpoints/step-{done:06d}").exists() else "stepping"


def _steps(run: Path) -> int:
    try:
        return sum('"loss"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


class Chaos:
    """Runs cases in `folder`; keeps the undisturbed runs to compare with."""

    def __init__(self, folder: Path):
        self._folder, self._home = folder, folder / "home"
        self._expected: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}
        prepare(self._home)

    def expected(self, kind: str, ranks: int) -> tuple[dict[str, Any], float]:
        """(the result, the seconds) of the undisturbed run."""
        if (kind, ranks) not in self._expected:
            run = self._folder / f"{kind}-{ranks}"
            started = time.monotonic()
            job = Forked(command(self._home, kind, run), ranks, self._folder / f"{kind}-{ranks}.txt")
            assert wait(job) and job.succeeded, (self._folder / f"{kind}-{ranks}.txt").read_text()
            self._expected[kind, ranks] = result(run), time.monotonic() - started
            assert check(run, self._expected[kind, ranks][0]) == ""
        return self._expected[kind, ranks]

    def run(self, case: Case) -> tuple[str, str]:
        """(what the run was doing when it was disturbed, what is wrong with its end)."""
        expected, seconds = self.expected(case.kind, case.ranks)
        with disk(self._folder / f"case-{case.number}", case.fault == "disk") as place:
            log = self._folder / f"case-{case.number}.txt"
            words = command(self._home, case.kind, place / "run")
            limit = 200_000 if case.fault == "disk" and not place.is_mount() else None
            job = case.start(words, log, limit)
            doing = disturb(job, case, place, seconds + (8.0 if case.how != "forked" else 0.0))
            if not wait(job, SOON if case.fault in ("kill", "node") and doing != "ended" else PATIENCE):
                return doing, "the disturbed attempt hung"
            (place / "ballast").unlink(missing_ok=True)
            told = case.fault in ("term", "usr1") and not job.succeeded and case.how == "forked"
            if told and doing != "loading" and not (place / "run/PREEMPTED").exists():
                return doing, "no marker"
            again = case.start(words, log)
            if not wait(again):
                return doing, "the second attempt hung"
            if not again.succeeded:
                return doing, "the second attempt failed"
            return doing, check(place / "run", expected)


def disturb(job: Forked | Launched, case: Case, place: Path, seconds: float) -> str:
    """Wait for the moment, then do the fault; what the run was doing, or "ended" if the moment never came."""
    run, started = place / "run", time.monotonic()
    least = 1 if case.fault == "stop" else 0  # ranks wait half an hour for each other before the first step

    def now() -> bool:
        if case.fault == "node" and not run.exists():  # before they have met, the other one waits for it for minutes
            return False
        if case.moment == "any":
            return time.monotonic() - started >= case.share * seconds and _steps(run) >= least
        after = _steps(run) >= max(least, int(case.share * STEPS))
        return phase(run) == case.moment and (after or case.moment == "exporting")

    while not now():
        if job.poll():
            return "ended"
        if time.monotonic() > started + PATIENCE:
            return "ended"
        time.sleep(0.001)
    if case.moment == "evaluating":
        time.sleep(case.share * 0.05)
    doing = phase(run)
    hit(job, case, place)
    return doing


def hit(job: Forked | Launched, case: Case, place: Path) -> None:
    """Do the fault."""
    pids = job.ranks
    victim = pids[case.rank % len(pids)] if pids else 0
    if case.fault == "kill" and victim:
        job.signal(victim, signal.SIGKILL)
    elif case.fault == "node" and isinstance(job, Launched):
        job.kill_node(case.rank)
    elif case.fault in ("term", "twice"):
        job.signal_all(signal.SIGTERM)
        if case.fault == "twice":
            time.sleep(1.2)
            if not job.poll():
                job.signal_all(signal.SIGTERM)
    elif case.fault == "usr1":
        job.signal_all(signal.SIGUSR1)
    elif case.fault == "stop" and victim:
        job.signal(victim, signal.SIGSTOP)
        if len(pids) == 1:
            time.sleep(0.5)
            job.signal(victim, signal.SIGKILL)
    elif case.fault == "disk" and place.is_mount():
        free = shutil.disk_usage(place).free
        with suppress(OSError):  # the run may have taken the rest meanwhile
            (place / "ballast").write_bytes(bytes(max(0, free - int(case.share * 200_000))))


@contextmanager
def disk(place: Path, small: bool) -> Iterator[Path]:
    """A folder, on a disk of 16 MiB of its own if that is wanted and may be mounted."""
    place.mkdir()
    mounted = small and os.geteuid() == 0
    if mounted:
        words = ["mount", "-t", "tmpfs", "-o", "size=16m", "chaos", str(place)]
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", choices=SETS, help="these cases instead of drawn ones")
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    drawn = [Case.draw(flags.seed, number) for number in range(flags.first, flags.first + flags.cases)]
    cases = SETS[flags.set] if flags.set else drawn
    raise SystemExit(1 if run_all(cases, folder) else 0)


def run_all(cases: list[Case], folder: Path) -> int:
    """Run the cases, print a line for each and a table at the end; how many failed."""
    chaos, table, failed = Chaos(folder), Counter[tuple[str, str]](), 0
    for case in cases:
        started = time.monotonic()
        doing, wrong = chaos.run(case)
        table[case.fault, doing] += 1
        print(
            f"{case.number:4d} {case.kind:10} {case.ranks} rank(s) {case.how:8} {case.fault:5} while {doing:15} "
            f"{time.monotonic() - started:5.1f} s  {wrong or 'same bits'}",
            flush=True,
        )
        if wrong:
            failed += 1
            print((folder / f"case-{case.number}.txt").read_text())
        else:
            shutil.rmtree(folder / f"case-{case.number}")
    print(f"\n{len(cases)} cases, {failed} failed; logs in {folder}")
    for (fault, doing), count in sorted(table.items()):
        print(f"{fault:5} while {doing:15} {count:4d}")
    return failed


if __name__ == "__main__":
    main()
