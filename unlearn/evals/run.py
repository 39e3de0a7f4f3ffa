"""WMDP and MMLU, or any other task of lm-eval on text, for any checkpoint, with what tells unlearning from collapse.

    python evals/run.py --model EleutherAI/deep-ignorance-unfiltered --tasks wmdp_bio_robust mmlu_stem --out results
    torchrun --nproc_per_node 4 evals/run.py --model runs/NAME/model --data-dir questions --out results \\
        --target 'wmdp_bio_robust<=0.25' --target 'mmlu_stem>=0.34' --baseline results/BASE

Any number of ranks gives the same numbers to the last bit. Without network give a local --model and --data-dir, which
`python evals/fetch.py` prepares. docs/reading-the-numbers.md says what is printed.
"""

from typing import TYPE_CHECKING, Any

from unlearn.config import parse_flags
from unlearn.evals.eval_config import EvalConfig
from unlearn.run.command_line import typed_command

if TYPE_CHECKING:
    from unlearn.evals.evaluation import Evaluation
    from unlearn.evals.judge.paired import Record


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Load, evaluate, judge, write and print."""
    # Here and not above, so that --help and a wrong flag answer at once.
    from unlearn.device import describe
    from unlearn.distributed import is_main, process_group
    from unlearn.evals.output import check_output, write_result
    from unlearn.files import files_hash
    from unlearn.model import load_model
    from unlearn.precision import DTYPES
    from unlearn.weights import Checkpoint

    with process_group(config.device) as device:
        if config.out is not None:  # mistakes in flags show before the long loading
            check_output(config.out, config.model, overwrite=config.overwrite)
        evaluation = _prepare(config)
        base = _baseline(config, evaluation)
        digest = files_hash(Checkpoint.open(config.model, revision=config.revision).paths())
        model = load_model(config.model, revision=config.revision, dtype=DTYPES[config.dtype], device=device)
        result = evaluation.measure(model, name=config.model, revision=config.revision)
        result["unlearn"] |= {"command": typed_command(), "model_sha256": digest, "device": describe(device)}
        try:
            evaluation.summarise(result)
            _judge(config, result, base)
            if is_main():
                print(_report(result))
        finally:  # what the model answered is kept, whatever becomes of its summary
            if config.out is not None:
                file = write_result(result, config.out, overwrite=config.overwrite, samples=config.samples)
                if file is not None:
                    print(f"Results in {file}")


def _prepare(config: EvalConfig) -> "Evaluation":
    """Questions, templates, tokens and the plan of the work, and every mistake in them."""
    from unlearn.evals.evaluation import Evaluation
    from unlearn.evals.judge.targets import check_targets, parse_pools, parse_target
    from unlearn.model import load_config, load_tokenizer

    evaluation = Evaluation(
        load_tokenizer(config.model, revision=config.revision),
        tasks=config.tasks,
        data_dir=config.data_dir,
        include_path=config.include_path,
        limit=config.limit,
        subsample=config.subsample,
        permute=config.permute_choices,
        truncate=config.truncate,
        metric=config.metric,
        pools=parse_pools(config.pool),
        shots=config.num_fewshot,
        chat=config.chat_template,
        batch_tokens=config.batch_tokens,
        device=config.device,
        model_config=load_config(config.model, revision=config.revision),
    )
    check_targets(map(parse_target, config.target), evaluation.names)
    return evaluation


def _baseline(config: EvalConfig, evaluation: "Evaluation") -> "Record | None":
    """The results to compare with, once it is sure that they answer the same questions."""
    from unlearn.evals.judge.paired import check_same, read_record

    if config.baseline is None:
        return None
    base = read_record(config.baseline)
    check_same(base, evaluation.asked())
    return base


def _judge(config: EvalConfig, result: dict[str, Any], base: "Record | None") -> None:
    """Add the verdict and the comparison to our key of the results."""
    from unlearn.evals.judge.paired import Record, compare, rounding_warning
    from unlearn.evals.judge.targets import parse_target
    from unlearn.evals.judge.verdict import judge

    own = result["unlearn"]
    if config.target:
        own["verdict"] = judge(own["summary"], map(parse_target, config.target))
    if base is not None:
        new = Record(config.model, own["questions"], result["group_subtasks"] | own["pools"], own["dtypes"])
        own["baseline"] = {"source": base.source, "tasks": compare(base, new, margin=config.margin)}
        own["baseline"]["warning"] = rounding_warning(base, new)


def _report(result: dict[str, Any]) -> str:
    """lm-eval's tables, then ours."""
    from lm_eval.utils import make_table

    from unlearn.evals.judge.paired import table
    from unlearn.evals.judge.summary import summary_table

    own = result["unlearn"]
    parts = [make_table(result)]
    if "groups" in result:
        parts.append(make_table(result, "groups"))
    if own["summary"]:
        parts.append(summary_table(own["summary"]))
    if own["left_out"]:
        asked = sum(counts["original"] for task, counts in result["n-samples"].items() if task in own["left_out"])
        parts.append(
            f"left out by --permute-choices: {sum(own['left_out'].values()):,} of {asked:,} questions, whose choices "
            "speak of each other's letters or places ('A and B', 'all of the above')"
        )
    if "baseline" in own:
        parts.append(f"against {own['baseline']['source']}, question by question\n{table(own['baseline']['tasks'])}")
        if own["baseline"]["warning"]:
            parts.append(own["baseline"]["warning"])
    if "verdict" in own:
        parts.append(own["verdict"]["words"])
    return "\n\n".join(part.rstrip("\n") for part in parts)


def main() -> None:
    """Parse and run."""
    evaluate_checkpoint(parse_flags(EvalConfig))
