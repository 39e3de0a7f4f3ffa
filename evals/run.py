"""Measure WMDP, MMLU or any other task of lm-eval: `unlearn eval`."""

from unlearn.errors import run_command
from unlearn.evals.run import main

if __name__ == "__main__":
    run_command("evals/run.py", main)
