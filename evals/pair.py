"""Compare two results question by question: `unlearn pair`."""

from unlearn.errors import run_command
from unlearn.evals.pair import main

if __name__ == "__main__":
    run_command("evals/pair.py", main)
