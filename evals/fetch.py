"""Fetch the tasks' questions, for machines without network: `unlearn fetch`."""

from unlearn.errors import run_command
from unlearn.evals.fetch import main

if __name__ == "__main__":
    run_command("evals/fetch.py", main)
