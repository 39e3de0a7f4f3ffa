"""Tune one method until a target is met: `unlearn sweep`."""

from unlearn.errors import run_command
from unlearn.launch.sweep import main

if __name__ == "__main__":
    run_command("launch/sweep.py", main)
