"""The same on a real pretrained model: `make demo-real`."""

from unlearn.errors import run_command
from unlearn.launch.demo_real import main

if __name__ == "__main__":
    run_command("launch/demo_real.py", main)
