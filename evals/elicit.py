"""Look for what a model still knows without training it: `unlearn elicit`."""

from unlearn.errors import run_command
from unlearn.evals.elicit import main

if __name__ == "__main__":
    run_command("evals/elicit.py", main)
