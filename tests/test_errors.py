"""Ctrl-C and exhausted memory end a command with one sentence, whatever the libraries under it make of them."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unlearn.distributed import process_group
from unlearn.errors import UserError

ROOT = Path(__file__).parents[1]
ARRIVES = "time.sleep(30)"
TURNS_INTO_ANOTHER = """
try:
    time.sleep(30)
except KeyboardInterrupt:
    raise ImportError("core.multiarray failed to import")
"""
IS_DROPPED = """
while time.monotonic() < start + 30:
    try:
        time.sleep(1)
    except KeyboardInterrupt as error:
        if (dropped := dropped + 1) == 3:
            raise
"""
COMMAND = """
import sys, time
from unlearn.errors import run_command
def command():
    dropped, start = 0, time.monotonic()
    print("ready", flush=True)
{}
run_command("a-command", command)
print("went on")
"""


def pressed(body: str, handler: signal.Handlers = signal.SIG_DFL) -> tuple[int, str, str]:
    """Exit code, output and error of a command doing `body` that Ctrl-C meets as soon as it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(textwrap.indent(body, "    "))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


@pytest.mark.parametrize("body", [ARRIVES, TURNS_INTO_ANOTHER, IS_DROPPED])
def test_an_interrupt_ends_the_command(body: str) -> None:
    assert pressed(body) == (130, "", "a-command: interrupted\n")


def test_a_background_job_goes_on() -> None:
    """A shell starts its background jobs with SIGINT ignored: the terminal's Ctrl-C is not meant for them."""
    assert pressed("time.sleep(1)", signal.SIG_IGN) == (0, "went on\n", "")


def all_memory() -> None:
    torch.empty(1 << 50)


def all_memory_of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")


@pytest.mark.parametrize("use", [all_memory, all_memory_of_a_gpu])
def test_memory_that_runs_out_is_a_sentence(use: Callable[[], None]) -> None:
    with pytest.raises(UserError, match="smaller --micro-batch") as caught, process_group():
        use()
    assert "\n" not in str(caught.value) and "allocate" in str(caught.value)


def test_another_error_keeps_its_traceback() -> None:
    code = COMMAND.format("    raise ImportError('a bug')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ImportError: a bug" in done.stderr


A_THREAD_OF_TORCH_GOES_ON = """
    import threading, torch
    from unlearn.errors import UserError
    def add():
        while True:
            torch.ones(100) + 1
    threading.Thread(target=add, daemon=True).start()
    time.sleep(0.2)
    {}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('so')", 1),
        ("raise ValueError", 1),
        ("raise UserError", 2),
    ],
)
def test_a_rank_ends_with_its_own_code(end: str, code: int) -> None:
    """Under torchrun no thread of torch's is met by the teardown of the interpreter, which aborts the process."""
    body = A_THREAD_OF_TORCH_GOES_ON.format(end)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(body)],
        cwd=ROOT,
        env=os.environ | {"RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "ready\n" + ("went on\n" if code == 0 else "")
