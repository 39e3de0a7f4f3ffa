"""A real model on genuine questions, against lm-eval's own HFLM. Skipped where there is no model, or no questions.

    UNLEARN_REAL_MODEL=smollm UNLEARN_REAL_QUESTIONS=questions pytest tests/test_evals_real.py

The model: any causal language model's folder; SmolLM2-135M was used. The questions: a folder for --data-dir with MMLU,
ARC-Easy and OpenBookQA.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from evals_stock import stock_tasks
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.evals.evaluation import Evaluation
from unlearn.evals.harness.choice_orders import depends_on_order
from unlearn.evals.harness.task_loader import load_tasks

MODEL, QUESTIONS = (os.environ.get(f"UNLEARN_REAL_{name}", "") for name in ("MODEL", "QUESTIONS"))
needs_model = pytest.mark.skipif(not MODEL, reason="UNLEARN_REAL_MODEL names no folder with a model")
needs_questions = pytest.mark.skipif(not QUESTIONS, reason="UNLEARN_REAL_QUESTIONS names no folder with questions")


@pytest.fixture(scope="module")
def real() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.slow
@needs_model
@needs_questions
@pytest.mark.parametrize(
    ("names", "limit", "bound"),
    [
        (["mmlu_anatomy", "mmlu_astronomy", "mmlu_high_school_psychology"], 5, 5e-5),
        (["arc_easy", "openbookqa"], 8, 2e-3),  # sums over the tokens of whole answers
    ],
    ids=["letters", "answers"],
)
def test_a_real_model_scores_as_with_hflm(
    real: tuple[PreTrainedModel, PreTrainedTokenizerBase], names: list[str], limit: int, bound: float
) -> None:
    """In float32: the same prompts, the same answers, log-likelihoods within rounding."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = real
    ours = Evaluation(tokenizer, tasks=names, data_dir=QUESTIONS, limit=limit).run(model)
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    theirs: Any = evaluate(hflm, stock_tasks(Path(QUESTIONS), names), limit=limit, bootstrap_iters=2)
    worst = 0.0
    for name in names:
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            same = ("arguments", "doc_hash", "prompt_hash", "target_hash", *one["metrics"])
            assert [one[key] for key in same] == [other[key] for key in same]
            pairs = zip(one["filtered_resps"], other["filtered_resps"], strict=True)
            worst = max(worst, *(abs(score - reference) for (score, _), (reference, _) in pairs))
        assert ours["results"][name]["acc,none"] == theirs["results"][name]["acc,none"]
    print(f"largest difference of a log-likelihood: {worst:.1e}")
    assert worst < bound


@needs_questions
def test_mmlu_questions_that_depend_on_the_order_of_their_choices() -> None:
    """Of MMLU's 14,042, 48 and some in lower case name other letters, nearly 600 speak of the above or of all these."""
    tasks = load_tasks(["mmlu"], data_dir=QUESTIONS)["tasks"].values()
    choices = [document["choices"] for task in tasks for document in task.eval_docs]
    assert len(choices) == 14042 and sum(map(depends_on_order, choices)) == 681
