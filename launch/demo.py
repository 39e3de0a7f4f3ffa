"""The whole way on the embedded world: `make demo`."""

from unlearn.errors import run_command
from unlearn.launch.demo import main

if __name__ == "__main__":
    run_command("launch/demo.py", main)
