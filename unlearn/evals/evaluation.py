"""An evaluation that is prepared once and run on a live model as often as wanted."""

import gc
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from lm_eval.evaluator import evaluate
from lm_eval.utils import hash_string, sanitize_model_name
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from unlearn.device import choose_device
from unlearn.distributed import is_main, main_first, world_size
from unlearn.errors import UserError
from unlearn.evals.harness.answer_tokens import check_answer_tokens
from unlearn.evals.harness.chat import chat_template
from unlearn.evals.harness.lm import QUESTIONS, LiveModel, context_length
from unlearn.evals.harness.question_task import QuestionTask
from unlearn.evals.harness.requests import Planner
from unlearn.evals.harness.task_loader import compiled_templates, load_tasks
from unlearn.evals.judge.answers import Answers, collect, debias_small, prompt_id
from unlearn.evals.judge.summary import group_pools, summarise
from unlearn.evals.output import write_result
from unlearn.model_config import check_rows

# Accuracies have a closed-form standard error, which lm-eval computes if this is above 0; others are resampled.
BOOTSTRAP_ITERS = 1000
# Of one forward pass. A CPU's caches hold no more, and it has no latency of launches to hide.
BATCH_TOKENS = {"cuda": 16384, "cpu": 1024}


class LiveFlags(Protocol):
    """Flags of a command that measures a model between its steps."""

    @property
    def eval_tasks(self) -> Sequence[str]: ...
    @property
    def data_dir(self) -> str | None: ...
    @property
    def include_path(self) -> str | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def eval_subsample(self) -> int | None: ...
    @property
    def device(self) -> str | None: ...


class Evaluation:
    """Tasks with their requests and plan, kept from one run to the next.

    Every rank must build it alike and call `run` together.

    Args:
        tasks: names of lm-eval tasks, groups or tags.
        data_dir: folder of all question files, `<dataset_path>/<dataset_name>/<split>-*.parquet`; None: the hub.
        include_path: folder with further task definitions.
        limit: only the first so many questions of each task.
        subsample: only so many questions of each of `tasks`, shared out among its subjects and always the same.
        permute: ask questions with letters in every cyclic order of their choices.
        truncate: cut questions that are longer than the model's context from the left, instead of raising.
        metric: which of lm-eval's metrics to report for tasks that have it; the others keep the first of their own.
        pools: further rows of the summary: the tasks or groups that make up each.
        shots: few-shot examples before each question, but for tasks whose own definition says that there are none.
        chat: ask through the tokenizer's chat template, as lm-eval does with examples as turns.
        wording: what each prompt becomes, examples and chat template included.
        batch_tokens: tokens of one forward pass of one rank, padding included; None chooses by the device.
        device: that was asked for, see `device.choose_device`.
        model_config: of the model to be measured; with it questions that are too long, or have tokens that it has no
            row for, raise here, and not only when the model is measured.

    Attributes:
        names: all tasks and groups that are measured.

    Raises:
        UserError: an unknown task, missing data, no questions, a number that is not positive, questions too long
            for the model, a tokenizer that takes several tokens for a letter, or the same ones for two answers.
    """

    @classmethod
    def of(cls, flags: LiveFlags, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> "Evaluation":
        """What a command measures on its live model, by the flags that `train.py` and the attack share."""
        return cls(
            tokenizer,
            tasks=flags.eval_tasks,
            data_dir=flags.data_dir,
            include_path=flags.include_path,
            limit=flags.limit,
            subsample=flags.eval_subsample,
            device=flags.device,
            model_config=model_config,
        )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tasks: Sequence[str],
        data_dir: str | Path | None = None,
        include_path: str | Path | None = None,
        limit: int | None = None,
        subsample: int | None = None,
        permute: bool = False,
        truncate: bool = False,
        metric: str | None = None,
        pools: Mapping[str, Sequence[str]] | None = None,
        shots: int | None = None,
        chat: bool = False,
        wording: Callable[[str], str] | None = None,
        batch_tokens: int | None = None,
        device: str | None = None,
        model_config: PretrainedConfig | None = None,
    ):
        """Load the questions, fill the templates, and tokenise."""
        for name, value in (("limit", limit), ("subsample", subsample)):
            if value is not None and value <= 0:
                raise UserError(f"expected --{name} above 0; found {value}: leave it out to take all questions")
        self.tokenizer, self.limit, self.subsample = tokenizer, limit, subsample
        self._planned: int | None = None  # the context length that was planned for
        self._chat = chat
        self._planner = Planner(tokenizer, batch_tokens or BATCH_TOKENS[choose_device(device).type], truncate=truncate)
        template = chat_template(tokenizer) if chat else None
        # Only what comes from the hub goes through a cache that one rank should fill first.
        with main_first() if data_dir is None else nullcontext():
            with _quiet(), compiled_templates():
                self._loaded = load_tasks(
                    tasks,
                    data_dir=data_dir,
                    include_path=include_path,
                    limit=limit,
                    subsample=subsample,
                    permute=permute,
                    shots=shots,
                )
                self._metrics = _choose_metrics(self.tasks, metric)
                for task in self.tasks.values():
                    task.chat_template = template
                    task.wording = wording
                    task.build_all_requests()
        measured = [*self.tasks, *self._loaded["groups"]]
        self._pools = self._check_pools(pools or {}, measured)
        self.names = [*measured, *self._pools]
        if model_config is not None:
            self._plan(context_length(model_config, tokenizer))
            check_rows(model_config, self.largest_token())
        # Hundreds of thousands of objects that stay: the garbage collector need not walk through them in each `run`.
        gc.collect()
        gc.freeze()

    @property
    def tasks(self) -> dict[str, QuestionTask]:
        """The tasks with questions, by name."""
        return self._loaded["tasks"]

    def asked(self) -> dict[str, dict[str, Any]]:
        """What will be asked, by task: `metric`, `ids` and `prompts` as `Answers` has them."""
        hashes = {name: task.hashes() for name, task in self.tasks.items()}
        return {
            name: {
                "metric": self._metrics[name],
                "ids": [one.doc_hash[:16] for one in found],
                "prompts": [prompt_id(one.prompt_hash, one.target_hash) for one in found],
            }
            for name, found in hashes.items()
        }

    def sha256(self) -> str:
        """Of every question, as it is asked."""
        asked = {name: {kind: found[kind] for kind in ("ids", "prompts")} for name, found in self.asked().items()}
        return hash_string(json.dumps(asked))

    def largest_token(self) -> dict[str, int]:
        """The largest token of the questions that were planned, for `check_rows`."""
        return {QUESTIONS: self._planner.largest}

    def run(self, model: PreTrainedModel, *, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
        """Measure `model` as it is: in training or not, plain or sharded.

        Args:
            name: what the results call the model; None takes the model's own name.
            revision: recorded only.

        Returns:
            lm-eval's result dictionary with `samples`, the same on every rank; `answers`, an `Answers` for each task
            with an accuracy; and under `unlearn` what this project adds: data digests, dtypes, ties, truncations,
            world size, seconds, `questions` (`Answers.record` by task), and `summary` (`summary.summarise`).

        Raises:
            UserError: a log-likelihood is NaN, or the ranks were given different questions.
        """
        result = self.measure(model, name=name, revision=revision)
        self.summarise(result)
        return result

    def measure(
        self, model: PreTrainedModel, *, name: str | None = None, revision: str | None = None
    ) -> dict[str, Any]:
        """What `run` returns, but for the summary: worth keeping even if that should fail."""
        started = time.time()
        lm = LiveModel(model, self.tokenizer, planner=self._planner)
        self._plan(lm.max_length)
        with _quiet(), compiled_templates():
            # The samples are put together here: lm-eval would hash every question again in every evaluation.
            result: dict[str, Any] = evaluate(lm, self._loaded, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=False)
        result["samples"] = {task: found.samples() for task, found in self.tasks.items()}
        seconds = time.time() - started
        name = name or model.config._name_or_path or type(model).__name__
        result.update(self._description(model, name, revision, started, seconds))
        for task, counts in result["n-samples"].items():
            counts["original"] = self.tasks[task].available
        result["task_hashes"] = {task: _hash_of_task(samples) for task, samples in result["samples"].items()}
        result["answers"] = self._answers(result["samples"], lm.tokens)
        result["unlearn"] = self._own(lm, result["answers"], seconds)
        return result

    def summarise(self, result: dict[str, Any]) -> None:
        """Add the summary to what `measure` returned, and the standard errors that follow from it."""
        result["unlearn"]["summary"] = summarise(result)
        _cluster_errors(result)

    def write(
        self, result: dict[str, Any], out: str | Path, *, overwrite: bool = False, samples: bool = False
    ) -> Path | None:
        """Write a result below `out` in lm-eval's layout; every rank must call it. See `output.write_result`."""
        return write_result(result, Path(out), overwrite=overwrite, samples=samples)

    def _plan(self, max_length: int) -> None:
        """Plan what lm-eval will ask for, so that what is wrong with the questions shows before any forward pass."""
        if self._planned == max_length:
            return
        asked: dict[str, list[Any]] = {}
        for task in self.tasks.values():
            for instance in task.instances:
                asked.setdefault(instance.request_type, []).extend([instance.args] * (instance.repeats or 1))
        if "loglikelihood_rolling" in asked:
            self._planner.plan_rolling([text for (text,) in asked["loglikelihood_rolling"]], max_length)
        if "loglikelihood" in asked:
            plan = self._planner.plan(asked["loglikelihood"], max_length)
            self._check_answers(dict(zip(asked["loglikelihood"], plan.continuations, strict=True)))
        if "generate_until" in asked:
            self._planner.contexts([context for context, _ in asked["generate_until"]])
        self._planned = max_length

    def _check_answers(self, scored: Mapping[tuple[str, str], list[int]]) -> None:
        """Raise unless the answers to each question with choices can be told apart by their tokens."""
        for name, task in self.tasks.items():
            if task.OUTPUT_TYPE == "multiple_choice":
                asked = [[request.args for request in requests] for requests in task.by_question()]
                check_answer_tokens(name, asked, scored, self.tokenizer, letters=task.letters is not None)

    def _check_pools(self, pools: Mapping[str, Sequence[str]], measured: Sequence[str]) -> dict[str, list[str]]:
        """The pools, if their parts are measured, in one metric, and their names are their own."""
        for name, parts in pools.items():
            missing = [part for part in parts if part not in measured]
            if missing:
                raise UserError(
                    f"expected the tasks of --pool {name} among --tasks; found no {missing[0]}: add it to --tasks"
                )
            if name in measured:
                raise UserError(f"expected a new name for --pool; found {name}, which is a task: choose another")
            found = group_pools(self._metrics, {**self._loaded["group_map"], name: parts})[name]
            if len(set(found)) > 1:
                raise UserError(
                    f"expected tasks of one metric in --pool {name}; found {', '.join(map(str, dict.fromkeys(found)))}"
                    ": leave some out, or choose one with --metric"
                )
        return {name: list(parts) for name, parts in pools.items()}

    def _answers(
        self, samples: dict[str, list[dict[str, Any]]], tokens: Mapping[tuple[str, str], int]
    ) -> dict[str, Answers]:
        found = {}
        for name, task in self.tasks.items():
            metric = self._metrics[name]
            if metric is None:
                continue
            answers = collect(samples[name], metric, letters=task.letters, keys=task.keys, tokens=tokens)
            if answers is not None:
                found[name] = answers
        return debias_small(found)

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

    def _own(self, lm: LiveModel, answers: dict[str, Answers], seconds: float) -> dict[str, Any]:
        ties = {task: sum(found.ties) for task, found in answers.items() if found.ties}
        asked = sum(len(found.ties) for found in answers.values())
        return {
            "data": {name: task.provenance for name, task in self.tasks.items()},
            "dtypes": lm.dtypes(),
            "ties": ties,
            "tie_rate": sum(ties.values()) / asked if asked else None,
            "max_length": lm.max_length,
            "truncated_rows": sum(plan.truncated for plan in lm.plans) + lm.truncated_contexts,
            "rows": sum(len(batch) for plan in lm.plans for batch in plan.batches),
            "requests": sum(plan.requests for plan in lm.plans),
            "batches": sum(len(plan.batches) for plan in lm.plans),
            "subsample": self.subsample,
            "pools": self._pools,
            "chat_template": self._chat,
            "left_out": {name: task.left_out for name, task in self.tasks.items() if task.left_out},
            "orders": max(task.orders for task in self.tasks.values()),
            "world_size": world_size(),
            "seconds": seconds,
            "questions": {task: found.record() for task, found in answers.items()},
        }


def _choose_metrics(tasks: Mapping[str, QuestionTask], wanted: str | None) -> dict[str, str | None]:
    """The metric of each task, None where it has no accuracy; `UserError` if no task has the one that is wanted."""
    if wanted is not None and not any(wanted in task.metrics for task in tasks.values()):
        known = list(dict.fromkeys(name for task in tasks.values() for name in task.metrics))
        raise UserError(
            f"expected --metric as one that a task has and that is a mean over its questions; found {wanted!r}: "
            f"they have {', '.join(known) or 'none'}"
        )
    return {name: task.metric(wanted) for name, task in tasks.items()}


def _cluster_errors(result: dict[str, Any]) -> None:
    """Replace the standard errors of questions asked in several orders, which lm-eval takes to be independent."""
    for name, numbers in result["unlearn"]["summary"].items():
        if "orders" in numbers:
            for table in (result["results"], result.get("groups", {})):
                if name in table:
                    table[name][f"{numbers['metric']}_stderr,none"] = numbers["stderr"]


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
