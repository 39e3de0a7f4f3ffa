"""Tuning on the embedded world: `make demo-sweep`."""

from unlearn.errors import run_command
from unlearn.launch.demo_sweep import main

if __name__ == "__main__":
    run_command("launch/demo_sweep.py", main)
