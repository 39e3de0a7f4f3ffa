"""An evaluation that is prepared once and run on a live model as often as wanted."""

import importlib.metadata
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.utils import hash_string, sanitize_model_name
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.lm import LiveModel
from evals.output import write_result
from evals.plan import Planner
from evals.summary import summarise
from evals.task_loader import compiled_templates, load_tasks
from unlearn.distributed import is_main, main_first, world_size
from unlearn.errors import UserError

# Accuracies have a closed-form standard error, which lm-eval computes if this is above 0; others are resampled.
BOOTSTRAP_ITERS = 1000


class Evaluation:
    """Tasks with their requests and plan, kept from one run to the next.

    Every rank must build it alike and call `run` together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tasks: Sequence[str],
        data_dir: str | Path | None = None,
        include_path: str | Path | None = None,
        limit: int | None = None,
        batch_tokens: int = 16384,
    ):
        """Load the questions and fill the templates.

        Args:
            tasks: names of lm-eval tasks, groups or tags.
            data_dir: folder of all question files, `<dataset_path>/<dataset_name>/<split>-*.parquet`; None: the hub.
            include_path: folder with further task definitions.
            limit: only the first so many questions of each task.
            batch_tokens: tokens of one forward pass of one rank, padding included.

        Raises:
            UserError: an unknown task, missing data, a task that is not multiple choice, a number that is not positive.
        """
        if limit is not None and limit <= 0:
            raise UserError(f"expected --limit above 0; found {limit}: leave it out to take all questions")
        self.tokenizer, self.limit = tokenizer, limit
        self._planner = Planner(tokenizer, batch_tokens)
        # Only what comes from the hub goes through a cache that one rank should fill first.
        with main_first() if data_dir is None else nullcontext():
            with _quiet(), compiled_templates():
                self._tasks = load_tasks(tasks, data_dir=data_dir, include_path=include_path)
                for task in self._tasks["tasks"].values():
                    task.build_all_requests(limit=limit)

    def run(self, model: PreTrainedModel, *, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
        """Measure `model` as it is: in training or not, plain or sharded.

        Args:
            name: what the results call the model; None takes the model's own name.
            revision: recorded only.

        Returns:
            lm-eval's result dictionary with `samples`, the same on every rank, and under `unlearn` what this project
            adds: data digests, dtypes, ties, truncations, world size, seconds, and `summary.summarise`.

        Raises:
            UserError: a log-likelihood is NaN, or the ranks were given different questions.
        """
        started = time.time()
        lm = LiveModel(model, self.tokenizer, planner=self._planner)
        with _quiet(), compiled_templates():
            result: dict[str, Any] = evaluate(
                lm, self._tasks, limit=self.limit, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=True
            )
        seconds = time.time() - started
        name = name or model.config._name_or_path or type(model).__name__
        result.update(self._description(model, name, revision, started, seconds))
        result["task_hashes"] = {task: _hash_of_task(samples) for task, samples in result["samples"].items()}
        result["unlearn"] = self._own(lm, result["samples"], seconds) | {"summary": summarise(result)}
        return result

    def write(self, result: dict[str, Any], out: str | Path, *, overwrite: bool = False) -> Path | None:
        """Write a result below `out` in lm-eval's layout; every rank must call it. See `output.write_result`."""
        return write_result(result, Path(out), overwrite=overwrite)

    def _description(
        self, model: PreTrainedModel, name: str, revision: str | None, started: float, seconds: float
    ) -> dict[str, Any]:
        """The keys that lm-eval's `simple_evaluate` and its results writer add."""
        first = next(model.parameters())
        tokens = {kind: getattr(self.tokenizer, f"{kind}_token") for kind in ("pad", "eos", "bos")}
        return {
            "config": {
                "model": "unlearn",
                "model_args": {"pretrained": name, "revision": revision},
                "model_num_parameters": sum(parameter.numel() for parameter in model.parameters()),
                "model_dtype": str(first.dtype),
                "model_revision": revision or "main",
                "batch_size": f"{self._planner.batch_tokens} tokens",
                "device": first.device.type,
                "limit": self.limit,
                "bootstrap_iters": BOOTSTRAP_ITERS,
            },
            "date": started,
            "lm_eval_version": importlib.metadata.version("lm_eval"),
            "transformers_version": importlib.metadata.version("transformers"),
            **{
                f"tokenizer_{kind}_token": [token, str(getattr(self.tokenizer, f"{kind}_token_id"))]
                for kind, token in tokens.items()
            },
            "model_source": "unlearn",
            "model_name": name,
            "model_name_sanitized": sanitize_model_name(name),
            "total_evaluation_time_seconds": str(seconds),
        }

    def _own(self, lm: LiveModel, samples: dict[str, list[dict[str, Any]]], seconds: float) -> dict[str, Any]:
        plan = lm.plan
        assert plan is not None, "evaluate asks at least one question"
        ties = {task: sum(map(_is_tie, rows)) for task, rows in samples.items()}
        return {
            "data": {name: task.provenance for name, task in self._tasks["tasks"].items()},
            "dtypes": lm.dtypes(),
            "ties": ties,
            "tie_rate": sum(ties.values()) / sum(map(len, samples.values())),
            "max_length": lm.max_length,
            "truncated_rows": plan.truncated,
            "rows": sum(map(len, plan.batches)),
            "requests": plan.requests,
            "batches": len(plan.batches),
            "world_size": world_size(),
            "seconds": seconds,
        }


def _is_tie(sample: dict[str, Any]) -> bool:
    """Whether two choices share the highest log-likelihood: the first then wins by its place alone."""
    scores = [response[0] for response in sample["filtered_resps"]]
    return scores.count(max(scores)) > 1


def _hash_of_task(samples: list[dict[str, Any]]) -> str:
    return hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in samples))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block lm-eval logs warnings from rank 0 only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.WARNING if is_main() else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
