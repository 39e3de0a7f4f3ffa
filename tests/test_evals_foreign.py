"""Results that lm-eval itself wrote, with its samples, beside ours of the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
from evals_stock import stock_tasks
from evals_support import make_model, make_tokenizer, question, write_wmdp

from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.judge.foreign import own_part
from unlearn.evals.judge.paired import compare, read_record

CLOZE = """
task: cloze
dataset_path: cais/wmdp
dataset_name: wmdp-bio
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
TASKS = ["wmdp_bio", "cloze"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """results_<time>.json of one model, by lm-eval's own evaluator, model and writer, and by ours."""
    pytest.importorskip("accelerate")
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("foreign")
    write_wmdp(folder / "data", [question(number, number % 4, number % 3) for number in range(24)])
    (folder / "tasks").mkdir()
    (folder / "tasks/cloze.yaml").write_text(CLOZE)
    tokenizer = make_tokenizer()
    model = make_model()
    ours = Evaluation(tokenizer, tasks=TASKS, data_dir=folder / "data", include_path=folder / "tasks")
    result = ours.run(model, name="owner/model")
    ours.summarise(result)
    found = {"ours": ours.write(result, folder / "ours")}
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    tasks = stock_tasks(folder / "data", TASKS, include_path=folder / "tasks")
    theirs: Any = evaluate(hflm, tasks, log_samples=True, bootstrap_iters=2)
    samples = theirs.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder / "theirs"))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.save_results_aggregated(theirs, samples)
    for name in TASKS:
        tracker.save_results_samples(name, samples[name])
    (found["theirs"],) = (folder / "theirs").rglob("results_*.json")
    return {name: file for name, file in found.items() if file is not None}


def test_the_same_questions_and_answers_are_read(files: dict[str, Path]) -> None:
    """So that a model that others measured can be paired with ours, question by question."""
    ours, theirs = read_record(files["ours"]), read_record(files["theirs"])
    assert "unlearn" not in json.loads(files["theirs"].read_text())
    assert theirs.questions == {name: theirs.questions[name] for name in TASKS}
    for name in TASKS:
        for key in ("metric", "ids", "prompts", "right", "answers", "targets", "letters", "debiased"):
            assert theirs.questions[name][key] == ours.questions[name][key], (name, key)
    assert len(ours.questions["wmdp_bio"]["letters"]) == 4 and not ours.questions["cloze"]["letters"]
    assert compare(ours, theirs)["wmdp_bio"]["difference"] == 0.0


def test_the_letter_check_is_made_of_them(files: dict[str, Path]) -> None:
    ours, theirs = (own_part(json.loads(file.read_text()), file)["summary"] for file in files.values())
    for name in TASKS:
        for key in ("acc", "interval", "questions"):
            assert theirs[name][key] == ours[name][key]
        assert theirs[name]["probability"] == pytest.approx(ours[name]["probability"], rel=1e-4)
    same = ("letter_check", "predicted", "independent", "p_more", "debiased")
    assert [theirs["wmdp_bio"][key] for key in same] == [ours["wmdp_bio"][key] for key in same]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("missing", "expected samples_.* beside .*; found none: evaluate with lm-eval's --log_samples"),
        ("damaged", "expected lm-eval's samples in .*; found a line of another kind"),
        ("empty", "expected lm-eval's samples in .*; found a line of another kind"),
    ],
)
def test_mistakes(change: str, found: str, files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / files["theirs"].name
    copy.write_bytes(files["theirs"].read_bytes())
    for file in files["theirs"].parent.glob("samples_*.jsonl"):
        if change != "missing":
            text = {"damaged": '{"filter": "none"}\n', "empty": ""}[change]
            (tmp_path / file.name).write_text(text)
    with pytest.raises(UserError, match=found):
        read_record(copy)
