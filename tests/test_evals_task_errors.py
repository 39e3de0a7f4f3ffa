"""What is wrong with a task's YAML or its data is one sentence, before the model answers anything."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from evals_support import make_model, make_tokenizer, question, write_questions, write_wmdp

from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation

YAML = """
task: own
dataset_path: own/rows
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROWS = [question(i, i % 4, None) for i in range(4)]


def prepare(folder: Path, yaml: str = YAML, rows: list[dict[str, Any]] | None = None, **options: Any) -> Evaluation:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/own.yaml").write_text(yaml)
    write_questions(folder / "own/rows", ROWS if rows is None else rows)
    return Evaluation(make_tokenizer(), tasks=["own"], data_dir=folder, include_path=folder / "tasks", **options)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{question}}", "{{questoin}}", "question 0|own to be built.*'questoin' is undefined"),
        ('"Question: {{question}}\\nAnswer:"', "questoin", "no column questoin, which doc_to_text names"),
        ("{{question}}", "{{question", "TemplateSyntaxError"),
        ("{{question}}", "{{choices}}", "a list .*where the template means a text"),
        ("{{question}}", "{{question}} {{choices[4]}}", "no element 4"),
        ("{{question}}", "{{question[0]}}", "item 0 of a text .* where the template means a list"),
        ("doc_to_choice: choices", "doc_to_choice: chioces", "ValueError: malformed"),
        ("doc_to_target: answer", "doc_to_target: anwser", "found 'anwser' in question 0"),
        ("output_type", "colour: red\noutput_type", "unexpected keyword argument 'colour'"),
        ("output_type", "process_docs: !function nowhere.rows\noutput_type", "ImportError|ModuleNotFoundError"),
        ("metric: acc,", "metric: akk,", "found 'akk' in task own: mend its metric_list"),
        ("multiple_choice", "multiple_choices", "Got invalid output_type"),
        ("task: own", "task: [own", "expected a task definition in .*own.yaml; found 'while parsing"),
        (
            "task: own",
            "task: own\ninclude: gone.yaml",
            "expected a task definition in .*own.yaml; found .*No such file",
        ),
        ("task: own", "task: own\nnum_fewshot: 9\nfewshot_split: test", "expected 9 few-shot examples .* own; found 3"),
    ],
)
def test_a_wrong_definition_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Each was a traceback, or a prompt of the column's name, or was called an unknown task."""
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, YAML.replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"choices": json.dumps(["o", "t", "c", "e"])},
            "choices of each question of task own as a list of texts; found '",
        ),
        ({"choices": ["it", "", "over", "fox"]}, r"as a list of texts; found \['it', '', 'over', 'fox'\]"),
        ({"choices": [1, 2, 3, 4]}, r"as a list of texts; found \[1, 2, 3, 4\]"),
        ({"choices": []}, r"as a list of texts; found \[\]"),
        ({"question": ["Which", "is"]}, "a list .*'Which', 'is'.* where the template means a text"),
        ({"question": None}, "nothing .None. where the template means a text"),
        ({"question": datetime(2024, 1, 2)}, "a datetime .*2024.* where the template means a text"),
        ({"question": b"Which?"}, "a bytes .* where the template means a text"),
        ({"answer": 1.0}, "found 1.0 in question"),
        ({"answer": "the fox"}, "found 'the fox' in question"),
    ],
)
def test_columns_of_another_type_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A text was indexed letter by letter, a list written as Python writes it, bytes as b'...'."""
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, rows=[row | change for row in ROWS])


def test_choices_of_a_letter_template_must_be_a_list_of_as_many(tmp_path: Path) -> None:
    """A JSON list as text gave the prompt "A. [ B. o C. t", three choices a traceback."""
    for choices, message in [
        (json.dumps(["o", "t", "c", "e"]), "item 0 of a text .* where the template means a list"),
        ("otce", "item 0 of a text"),
        (["o", "t", "c"], "no element 3"),
    ]:
        write_wmdp(tmp_path, [row | {"choices": choices} for row in ROWS])
        with pytest.raises(UserError, match=message):
            Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=tmp_path)
    write_wmdp(tmp_path, [{"query": row["question"], **{k: row[k] for k in ("choices", "answer")}} for row in ROWS])
    with pytest.raises(UserError, match="'question' is undefined.* mend the data's columns .query, choices, answer."):
        Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=tmp_path)


def test_an_answer_that_is_both_a_place_and_a_text_is_refused(tmp_path: Path) -> None:
    """ "1" of the choices "1", "2", "3" was taken for the second."""
    rows = [{"question": "Which?", "choices": ["1", "2", "3"], "answer": "1"}]
    with pytest.raises(UserError, match="found '1', which is place 1 and choice 0"):
        prepare(tmp_path, YAML.replace("doc_to_target: answer", 'doc_to_target: "{{answer}}"'), rows)
    assert prepare(tmp_path, rows=rows).tasks["own"].keys[0].right == (0,)


def test_a_broken_file_beside_the_task_is_named(tmp_path: Path) -> None:
    """It was skipped without a word."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/other.yaml").write_text("task: other\n\tbad: tab\n")
    with pytest.raises(UserError, match="expected a task definition in .*other.yaml"):
        prepare(tmp_path)


PARTIAL = """
def shares(doc, results):
    return {"acc": 0.25 + 0.5 * (doc["answer"] % 2), "acc_norm": 1.0}

def pairs(doc, results):
    return {"acc": (doc["answer"], 1), "acc_norm": 1.0}

def first(items):
    return sum(a == b for a, b in items) / len(items)
"""


def test_partial_credit_is_summed_up_as_it_is(tmp_path: Path) -> None:
    """A share below one half counted as wrong: lm-eval said 0.40, the summary 0.0 [0.0, 27.8], and judged by it."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.py").write_text(PARTIAL)
    rows = [question(i, i % 2, None) for i in range(10)]
    evaluation = prepare(tmp_path, YAML + "process_results: !function own.shares\n", rows)
    result = evaluation.run(make_model("neox"))
    numbers = result["unlearn"]["summary"]["own"]
    assert numbers["acc"] == result["results"]["own"]["acc,none"] == pytest.approx(0.5)
    assert numbers["stderr"] == pytest.approx(result["results"]["own"]["acc_stderr,none"])
    low, high = numbers["interval"]
    assert 0.5 - 2.4 * numbers["stderr"] < low < 0.5 < high < 0.5 + 2.4 * numbers["stderr"]
    assert "letters" not in numbers and "tie_rate" not in numbers


def test_an_accuracy_that_is_no_number_for_each_question_is_left_out(tmp_path: Path) -> None:
    """A pair with an aggregation of its own ended all forward passes with a TypeError."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.py").write_text(PARTIAL)
    pairs = YAML.replace("{metric: acc, aggregation: mean", "{metric: acc, aggregation: !function own.first")
    result = prepare(tmp_path, pairs + "process_results: !function own.pairs\n").run(make_model("neox"))
    assert result["results"]["own"]["acc,none"] == 0.25
    assert result["unlearn"]["summary"]["own"]["metric"] == "acc_norm"
    sys.modules.pop(str(tmp_path / "tasks/own"), None)
    with pytest.raises(UserError, match="question 0 of task own to fill .*TypeError"):
        prepare(tmp_path, YAML + "process_results: !function own.pairs\n")


def test_mutual_information_is_compared_as_lm_eval_does(tmp_path: Path) -> None:
    """Its further requests, without a context, failed an assertion after all forward passes."""
    yaml = YAML + "  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}\n"
    rows = [question(i, i % 4, None) | {"choices": [f"fox {i}", "the dog", f"over {i}", "lazy"]} for i in range(12)]
    for metric in ("acc", "acc_norm", "acc_mutual_info"):
        result = prepare(tmp_path, yaml, rows, metric=metric).run(make_model("neox"))
        numbers = result["unlearn"]["summary"]["own"]
        assert numbers["metric"] == metric and numbers["acc"] == result["results"]["own"][f"{metric},none"]
        assert len(result["answers"]["own"].answers) == 12
    with pytest.raises(
        UserError, match="expected --metric as one that a task has .*; found 'f1': they have acc, acc_norm"
    ):
        prepare(tmp_path, metric="f1")


GROUP = """
group: both
task: [own, more]
aggregate_metric_list:
  - {metric: acc, weight_by_size: false}
"""


def test_groups_that_weigh_subjects_alike_are_refused_unless_that_is_the_same(tmp_path: Path) -> None:
    """lm-eval said 0.50, the summary 0.90, and a target was met by it."""
    prepare(tmp_path)
    (tmp_path / "tasks/more.yaml").write_text(YAML.replace("task: own", "task: more").replace("own/rows", "own/more"))
    (tmp_path / "tasks/both.yaml").write_text(GROUP)
    options: dict[str, Any] = {"tasks": ["both"], "data_dir": tmp_path, "include_path": tmp_path / "tasks"}
    write_questions(tmp_path / "own/more", [*ROWS, *ROWS])
    with pytest.raises(UserError, match="found both, which takes the plain mean over subjects of 4 to 8 questions"):
        Evaluation(make_tokenizer(), **options)
    write_questions(tmp_path / "own/more", ROWS[::-1])
    result = Evaluation(make_tokenizer(), **options).run(make_model("neox"))
    assert result["unlearn"]["summary"]["both"]["acc"] == result["groups"]["both"]["acc,none"]
