"""Fine-tune an unlearned model and watch the knowledge return: `unlearn attack`."""

from unlearn.errors import run_command
from unlearn.evals.tamper import main

if __name__ == "__main__":
    run_command("evals/tamper.py", main)
