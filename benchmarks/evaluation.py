"""Evaluation against lm-eval as it comes: CPU time of the forward passes, and of everything before and after them.

    python benchmarks/evaluation.py

Forward passes: letter questions of the embedded world, lengthened to the 100 tokens that WMDP-Bio's have; random models
with V = 50,304, one thread, float32, the same rows a batch for lm-eval's own HFLM (which needs accelerate) and for us;
both alternate in one process, so that a noisy machine is noisy for both. A small body (4 blocks, hidden 128) leaves
mostly the unembedding, which HFLM multiplies at every position; a heavy one (hidden 1,024) leaves mostly the body.

Fixed costs: all 57 tasks of MMLU at their full 14,042 questions, made of invented words.
"""

import argparse
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from unlearn.evals.evaluation import Evaluation
from unlearn.evals.harness.lm import LiveModel
from unlearn.evals.harness.task_loader import compiled_templates, load_tasks
from unlearn.evals.harness.task_search import LM_EVAL_TASKS
from unlearn.model import load_tokenizer
from unlearn.world.build import WEIGHTS, write_world

VOCABULARY, ROWS, QUESTIONS, SUBJECT_QUESTIONS = 50_304, 16, 14_042, 246
BODIES = {"small body": 128, "heavy body": 1024}


def random_model(hidden: int) -> PreTrainedModel:
    """GPT-NeoX of 4 blocks with large weights, so that log-likelihoods differ."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    return GPTNeoXForCausalLM(config).eval()


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of `work`, all threads, and what it returns."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def forwards(requests: list[Any], tokenizer: PreTrainedTokenizerBase, repeats: int) -> None:
    """Both models on the same questions, alternating."""
    longest = max(len(tokenizer.encode(request.args[0])) for request in requests)
    for name, hidden in BODIES.items():
        model = random_model(hidden)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=ROWS)
        times: dict[str, list[float]] = {"HFLM": [], "ours": []}
        for _ in range(repeats):
            seconds, expected = cpu_seconds(functools.partial(stock.loglikelihood, requests, disable_tqdm=True))
            times["HFLM"].append(seconds)
            live = LiveModel(model, tokenizer, batch_tokens=ROWS * longest)  # anew: it tokenises anew, as HFLM does
            seconds, found = cpu_seconds(functools.partial(live.loglikelihood, requests, disable_tqdm=True))
            times["ours"].append(seconds)
        ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["HFLM"], strict=True)]
        apart = max(abs(mine[0] - theirs[0]) for mine, theirs in zip(found, expected, strict=True))
        print(
            f"{name} (hidden {hidden}): HFLM {statistics.median(times['HFLM']):.2f} s, ours "
            f"{statistics.median(times['ours']):.2f} s of CPU; ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}); log-likelihoods within {apart:.1e}",
            flush=True,
        )


def letter_questions(tokenizer: PreTrainedTokenizerBase, questions: int) -> list[Instance]:
    """Letter questions of the embedded world after the beginning of a document, about 100 tokens each."""
    with tempfile.TemporaryDirectory() as folder:
        write_world(f"{folder}/world")
        lines = Path(f"{folder}/world/corpora/forget.jsonl").read_text().splitlines()
        with compiled_templates():
            (task,) = load_tasks(["wmdp_bio"], data_dir=f"{folder}/world/data", limit=questions)["tasks"].values()
            task.build_all_requests()
    for instance in task.instances:
        text = json.loads(lines[instance.doc_id])["text"]
        context, letter = instance.args
        instance.arguments = (f"{tokenizer.decode(tokenizer.encode(text)[:60])}\n\n{context}", letter)
    return task.instances


def write_mmlu(root: Path) -> None:
    """14,042 questions of invented words in MMLU's layout, about 100 tokens each."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(3000)]
    subjects = sorted(file.stem.removeprefix("mmlu_") for file in (LM_EVAL_TASKS / "mmlu/default").glob("mmlu_*.yaml"))
    for number, subject in enumerate(subjects):
        size = SUBJECT_QUESTIONS if number else QUESTIONS - SUBJECT_QUESTIONS * (len(subjects) - 1)
        rows = [
            {
                "question": " ".join(rng.choices(words, k=8 + int(rng.expovariate(1 / 30)))) + "?",
                "subject": subject,
                "choices": [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(4)],
                "answer": rng.randrange(4),
            }
            for _ in range(size)
        ]
        folder = root / "cais/mmlu" / subject
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")


def stock_ready(root: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """lm-eval's own way to the first forward pass, but for the files' place."""

    class Local(ConfigurableTask):
        def __init__(self, config: dict[str, Any]):
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            files = str(root / "cais/mmlu" / str(self.DATASET_NAME) / "test-*.parquet")
            found = datasets.load_dataset("parquet", data_files={"test": files, "dev": files})
            self.dataset = found

    manager = TaskManager()
    index = manager.task_index
    loaded = manager.load([manager._factory.build(index["mmlu"], overrides={"class": Local}, registry=index)])
    pairs = []
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)
        task.build_all_requests()
        pairs += [instance.args for instance in task.instances]
    encoder = HFLM(pretrained=random_model(64), tokenizer=tokenizer, batch_size=1)
    for context, continuation in pairs:
        encoder._encode_pair(context, continuation)


def fixed_costs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Up to the first forward pass, and a second evaluation without its forward passes."""
    with tempfile.TemporaryDirectory() as folder:
        write_mmlu(Path(folder))
        model = random_model(64)
        seconds, evaluation = cpu_seconds(
            lambda: Evaluation(tokenizer, tasks=["mmlu"], data_dir=folder, model_config=model.config)
        )
        stock, _ = cpu_seconds(lambda: stock_ready(Path(folder), tokenizer))
        print(f"57 tasks of MMLU ready: stock {stock:.1f} s, ours {seconds:.1f} s of CPU", flush=True)
        forward = LiveModel._score_batch
        spent: list[float] = []

        def replayed(self: LiveModel, rows: Any, scores: Any) -> None:
            started = time.process_time()
            for row in rows:
                for index, _ in row.requests:
                    scores[index, 0] = -(index * 7919 % 1000) / 100  # any numbers will do
            spent.append(time.process_time() - started)

        LiveModel._score_batch = replayed  # type: ignore[method-assign]
        try:
            evaluation.run(model)
            spent.clear()
            seconds, _ = cpu_seconds(lambda: evaluation.run(model))
        finally:
            LiveModel._score_batch = forward  # type: ignore[method-assign]
        print(f"a repeated evaluation of them, over its forward passes: {seconds - sum(spent):.2f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=96)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(WEIGHTS / "tokenizer"))
    forwards(letter_questions(tokenizer, flags.questions), tokenizer, flags.repeats)
    fixed_costs(tokenizer)


if __name__ == "__main__":
    main()
