"""WMDP and MMLU, or any other multiple-choice task of lm-eval, for any checkpoint.

    python evals/run.py --model EleutherAI/deep-ignorance-unfiltered --tasks wmdp_bio mmlu_stem --out results
    torchrun --nproc_per_node 4 evals/run.py --model runs/NAME/model --data-dir questions --out results

Any number of ranks gives the same numbers to the last bit. Without network give a local --model and --data-dir.
"""

from evals.eval_config import EvalConfig
from unlearn.config import parse_flags
from unlearn.errors import run_command


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Load, evaluate, write and print."""
    # Here and not above, so that --help and a wrong flag answer at once.
    from lm_eval.utils import make_table

    from evals.evaluation import Evaluation
    from evals.output import check_output, write_result
    from unlearn.distributed import is_main, process_group
    from unlearn.model import load_model, load_tokenizer
    from unlearn.precision import DTYPES

    with process_group() as device:
        if config.out is not None:  # mistakes in flags show before the long loading
            check_output(config.out, config.model, overwrite=config.overwrite)
        evaluation = Evaluation(
            load_tokenizer(config.model, revision=config.revision),
            tasks=config.tasks,
            data_dir=config.data_dir,
            include_path=config.include_path,
            limit=config.limit,
            batch_tokens=config.batch_tokens,
        )
        model = load_model(config.model, revision=config.revision, dtype=DTYPES[config.dtype], device=device)
        result = evaluation.run(model, name=config.model, revision=config.revision)
        if is_main():
            print(make_table(result))
            if "groups" in result:
                print(make_table(result, "groups"))
        if config.out is not None:
            file = write_result(result, config.out, overwrite=config.overwrite)
            if file is not None:
                print(f"Results in {file}")


def main() -> None:
    """Parse and run."""
    evaluate_checkpoint(parse_flags(EvalConfig))


if __name__ == "__main__":
    run_command("evals/run.py", main)
