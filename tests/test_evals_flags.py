"""What users ask of an evaluation beside its tasks: examples, a chat template, rows, metrics; as lm-eval has it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evals_stock import stock_tasks
from evals_support import OracleModel, make_model, make_tokenizer, question, write_questions, write_stem, write_wmdp
from lm_eval.evaluator import evaluate

from unlearn.errors import UserError
from unlearn.evals import run
from unlearn.evals.eval_config import EvalConfig
from unlearn.evals.evaluation import BATCH_TOKENS, Evaluation
from unlearn.evals.harness.lm import LiveModel
from unlearn.evals.judge.verdict import judge
from unlearn.model import save_model

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CLOZE = """
task: cloze
dataset_path: own/cloze
test_split: test
output_type: multiple_choice
description: "Answer these."
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def measure(folder: Path, tasks: list[str], model: Any = None, **options: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    return Evaluation(tokenizer, tasks=tasks, data_dir=folder, **options).run(model or OracleModel(tokenizer))


def write_cloze(folder: Path, questions: int = 40) -> Path:
    words = "fox dog lazy planet red over again quick brown".split()
    rows = [
        {
            "question": f"Which {words[i % 9]} is {words[i * 5 % 7]} {i}?",
            "choices": [f"{words[(i * 7 + j * 2) % 9]} {words[(i + j) % 9]}"[: 4 + (i + 3 * j) % 9] for j in range(4)],
            "answer": i * 7 % 4,
        }
        for i in range(questions)
    ]
    write_questions(folder / "own/cloze", rows)
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/cloze.yaml").write_text(CLOZE)
    return folder / "tasks"


def test_tasks_may_be_joined_with_commas(tmp_path: Path) -> None:
    write_stem(tmp_path)
    write_wmdp(tmp_path, [question(i, i % 4, 0) for i in range(8)])
    joined = measure(tmp_path, ["wmdp_bio,mmlu_anatomy"])
    assert list(joined["results"]) == ["wmdp_bio", "mmlu_anatomy"]


def test_a_group_may_stand_beside_one_of_its_subjects(tmp_path: Path) -> None:
    """It was refused."""
    known = write_stem(tmp_path)
    alone, both = measure(tmp_path, ["mmlu_stem"]), measure(tmp_path, ["mmlu_anatomy", "mmlu_stem"])
    for key in ("results", "groups"):
        assert both[key] == alone[key]
    assert both["unlearn"]["summary"] == alone["unlearn"]["summary"]
    size, right = known["anatomy"]
    assert both["unlearn"]["summary"]["mmlu_anatomy"]["acc"] == pytest.approx(right / size)


def test_a_task_of_two_definitions_is_refused(tmp_path: Path) -> None:
    tasks = write_cloze(tmp_path)
    (tasks / "group.yaml").write_text("group: other\ntask: [{task: cloze, target_delimiter: ''}]\n")
    with pytest.raises(UserError, match="each task once in --tasks, or with one definition; found cloze"):
        measure(tmp_path, ["cloze", "other"], include_path=tasks)


def test_a_pool_is_a_row_over_all_questions_of_its_tasks(tmp_path: Path) -> None:
    """Subjects named one by one had no row together."""
    known = write_stem(tmp_path)
    result = measure(tmp_path, ["mmlu_anatomy", "mmlu_astronomy"], pools={"body": ["mmlu_anatomy", "mmlu_astronomy"]})
    (first, right), (second, more) = known["anatomy"], known["astronomy"]
    numbers = result["unlearn"]["summary"]["body"]
    assert numbers["questions"] == first + second and numbers["acc"] == pytest.approx((right + more) / (first + second))
    assert judge(result["unlearn"]["summary"], [run_target("body>=0.1")])["by_point"] == "met"
    for pools, message in [
        ({"body": ["mmlu_anatomy", "wmdp_bio"]}, "--pool body among --tasks; found no wmdp_bio"),
        ({"mmlu_anatomy": ["mmlu_anatomy", "mmlu_astronomy"]}, "new name for --pool; found mmlu_anatomy"),
    ]:
        with pytest.raises(UserError, match=message):
            measure(tmp_path, ["mmlu_anatomy", "mmlu_astronomy"], pools=pools)
    tasks = write_cloze(tmp_path)
    (tasks / "cloze.yaml").write_text(
        CLOZE.replace("  - {metric: acc, aggregation: mean, higher_is_better: true}\n", "")
    )
    with pytest.raises(UserError, match="one metric in --pool body; found acc_norm, acc"):
        measure(tmp_path, ["cloze", "mmlu_anatomy"], include_path=tasks, pools={"body": ["cloze", "mmlu_anatomy"]})


def run_target(text: str) -> Any:
    from unlearn.evals.judge.targets import parse_target

    return parse_target(text)


class ChatModel(LiveModel):
    """With what lm-eval asks of a model for its own chat templates."""

    tokenizer_name = "tests"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )


def write_mmlu(folder: Path) -> None:
    place = folder / "cais/mmlu/anatomy"
    write_questions(place, [question(i, i % 4, None) | {"subject": "anatomy"} for i in range(9)])
    write_questions(place, [question(50 + i, i % 4, None) | {"subject": "anatomy"} for i in range(5)], "dev")


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("shots", [0, 3])
def test_examples_and_chat_templates_are_lm_evals(tmp_path: Path, shots: int, chat: bool) -> None:
    """The prompts, and the answers in a chat without a space before them, are those of lm-eval's own evaluation."""
    write_mmlu(tmp_path)
    tasks = write_cloze(tmp_path)
    tokenizer, model = make_tokenizer(), make_model("neox", positions=4096)
    tokenizer.chat_template = TEMPLATE
    names = ["mmlu_anatomy"] if shots else ["mmlu_anatomy", "cloze"]
    options: dict[str, Any] = {"shots": shots, "chat": chat}
    ours = Evaluation(
        tokenizer, tasks=names, data_dir=tmp_path, include_path=tasks, model_config=model.config, **options
    )
    found = ours.run(model)
    expected: Any = evaluate(
        ChatModel(model, tokenizer, batch_tokens=BATCH_TOKENS["cpu"]),
        stock_tasks(tmp_path, names, include_path=tasks, shots=shots),
        bootstrap_iters=2,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    for name in names:
        assert [s["arguments"] for s in found["samples"][name]] == [s["arguments"] for s in expected["samples"][name]]
        scores = {key: value for key, value in expected["results"][name].items() if key.startswith("acc")}
        assert {key: found["results"][name][key] for key in scores} == scores
    prompt, letter = found["samples"]["mmlu_anatomy"][0]["arguments"][0]
    assert letter == ("A" if chat else " A") and prompt.count("What is fact") == 1 + shots
    assert ("<|user|>" in prompt) == chat and found["n-shot"]["mmlu_anatomy"] == shots
    assert found["unlearn"]["summary"]["mmlu_anatomy"]["letters"] == list("ABCD")


def test_examples_and_templates_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write_wmdp(tmp_path, [question(i, i % 4, None) for i in range(4)])
    with pytest.raises(UserError, match="takes examples for --num-fewshot; found only tasks .* num_fewshot: 0"):
        measure(tmp_path, ["wmdp_bio"], shots=5)
    with pytest.raises(UserError, match="chat template for --chat-template; found none"):
        measure(tmp_path, ["wmdp_bio"], chat=True)
    write_mmlu(tmp_path)
    with pytest.raises(UserError, match="expected 6 few-shot examples .* mmlu_anatomy; found 5"):
        measure(tmp_path, ["mmlu_anatomy"], shots=6)
    assert measure(tmp_path, ["mmlu_anatomy", "wmdp_bio"], shots=5)["n-shot"] == {"mmlu_anatomy": 5, "wmdp_bio": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pool": ("body",)}, "--pool as NAME=TASK,TASK"),
        ({"pool": ("body=one",)}, "--pool as NAME=TASK,TASK"),
        ({"pool": ("body=a,b", "body=c,d")}, "found body twice"),
        ({"num_fewshot": -1}, "--num-fewshot of 0 or more"),
        ({"batch_tokens": 0}, "--batch-tokens above 0"),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvalConfig(model="x", **flags)


def test_batches_are_chosen_by_device(tmp_path: Path) -> None:
    write_wmdp(tmp_path, [question(i, i % 4, None) for i in range(4)])
    evaluation = Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=tmp_path)
    assert evaluation._planner.batch_tokens == BATCH_TOKENS["cpu"] < BATCH_TOKENS["cuda"]


def test_a_metric_is_shown_judged_and_compared(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """acc_norm, the published metric of PIQA, HellaSwag and ARC-Challenge, could not be chosen."""
    tasks = write_cloze(tmp_path)
    (tmp_path / "model").mkdir()
    save_model(make_model("neox"), make_tokenizer(), tmp_path / "model")
    common = ["--model", tmp_path / "model", "--tasks", "cloze", "--data-dir", tmp_path, "--include-path", tasks]
    flags = [str(word) for word in [*common, "--dtype", "fp32"]]
    assert run_here(run.main, *flags, "--metric", "acc_norm", "--out", str(tmp_path / "norm")) == 0
    assert run_here(run.main, *flags, "--out", str(tmp_path / "plain")) == 0
    (file,) = (tmp_path / "norm").glob("*/results_*.json")
    result = json.loads(file.read_text())
    acc, norm = (result["results"]["cloze"][f"{metric},none"] for metric in ("acc", "acc_norm"))
    assert acc != norm and result["unlearn"]["summary"]["cloze"]["acc"] == norm
    capsys.readouterr()
    middle = (acc + norm) / 2
    target = f"cloze>={middle}" if norm > acc else f"cloze<={middle}"
    judged = [*flags, "--metric", "acc_norm", "--target", target]
    assert run_here(run.main, *judged, "--baseline", str(tmp_path / "norm")) == 0
    printed = capsys.readouterr().out
    assert "verdict: met by point estimate" in printed and "cloze (acc_norm)" in printed and "by acc_norm" in printed
    assert run_here(run.main, *judged, "--baseline", str(tmp_path / "plain")) == 2
    assert "expected acc_norm of task cloze in" in capsys.readouterr().err


def test_results_are_kept_whatever_becomes_of_their_summary(
    tmp_path: Path, run_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model had answered for hours was lost with a mistake in a number about it."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    write_wmdp(tmp_path / "data", [question(i, i % 4, None) for i in range(4)])
    (tmp_path / "model").mkdir()
    save_model(make_model("neox"), make_tokenizer(), tmp_path / "model")
    monkeypatch.setattr("unlearn.evals.evaluation.summarise", fail)
    words = [
        "--model",
        tmp_path / "model",
        "--tasks",
        "wmdp_bio",
        "--data-dir",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
    ]
    with pytest.raises(ZeroDivisionError):
        run_here(run.main, *map(str, words))
    (file,) = (tmp_path / "out").glob("*/results_*.json")
    assert len(json.loads(file.read_text())["unlearn"]["questions"]["wmdp_bio"]["right"]) == 4
