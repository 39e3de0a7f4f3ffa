"""Compare methods under attack: `unlearn compare`."""

from unlearn.errors import run_command
from unlearn.launch.compare import main

if __name__ == "__main__":
    run_command("launch/compare.py", main)
