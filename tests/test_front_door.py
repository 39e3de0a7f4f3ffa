"""`unlearn COMMAND`: every program by one name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import ROOT, flags, run

COMMANDS = "train eval attack elicit compare sweep fit-lens plan watch track export push pair fetch".split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_one_name(name: str) -> None:
    """`unlearn NAME` is the program of the repository's file, and says so; nothing heavy is imported for --help."""
    code = f"import sys; sys.argv = ['/usr/bin/unlearn', '{name}', '--help']; from unlearn.__main__ import entry\n"
    code += "try: entry()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = run("-c", code)
    assert result.returncode == 0 and f"usage: unlearn {name} " in result.stdout, result.stderr
    assert f"• {name} " in run("-m", "unlearn", "--help").stdout


def test_training_by_the_one_command(home: Path, tmp_path: Path) -> None:
    """The same as train.py, on two ranks too; run.json has the command as it was typed."""
    for ranks in (1, 2):
        result = run("-m", "unlearn", "train", *flags(home, tmp_path / str(ranks)), ranks=ranks)
        assert result.returncode == 0, result.stderr
        command = json.loads((tmp_path / str(ranks) / "run.json").read_text())["attempts"][-1]["command"]
        start = "python -m unlearn train " if ranks == 1 else "torchrun --nproc_per_node 2 -m unlearn train "
        assert command.startswith(start), command
    wrong = run("-m", "unlearn", "train", "--model", "/nowhere")
    assert wrong.returncode == 2 and "python -m unlearn: error: " in wrong.stderr


def test_output_that_nobody_reads_any_more() -> None:
    """As behind `| head`."""
    command = f"{sys.executable} train.py --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 141 and result.stderr == ""


def test_a_shell_completes_every_command_and_its_flags() -> None:
    result = run("-m", "unlearn", "--tyro-print-completion", "bash")
    assert result.returncode == 0 and "complete -F" in result.stdout
    assert all(command in result.stdout for command in COMMANDS)
    for flag in ("--lora-rank", "--permute-choices", "--general-drop", "--paraphrases", "--method-flags", "--grid"):
        assert flag in result.stdout, flag


def test_a_command_that_is_none() -> None:
    for words in ((), ("nonsense",)):
        result = run("-m", "unlearn", *words)
        assert result.returncode == 2 and "Traceback" not in result.stderr and "sweep" in result.stdout + result.stderr
