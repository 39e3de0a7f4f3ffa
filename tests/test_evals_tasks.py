"""Tasks, local data and whole evaluations, with lm-eval's genuine WMDP and MMLU templates and known answers."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from evals_support import (
    STEM,
    OracleModel,
    make_model,
    make_tokenizer,
    question,
    write_questions,
    write_stem,
    write_wmdp,
)

from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.harness.task_loader import compiled_templates, load_tasks
from unlearn.files import file_hash

CLOZE = """
task: world_cloze
dataset_path: embedded-world/questions
dataset_name: hazard
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def evaluate(root: Path, tasks: list[str], **options: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    return Evaluation(tokenizer, tasks=tasks, data_dir=root, **options).run(OracleModel(tokenizer))


def test_wmdp_accuracy_and_standard_error(tmp_path: Path) -> None:
    """7 of 10 right; one of the others, without a mark, is answered B."""
    said = [0, 1, 2, 3, 0, 1, 2, 0, 0, None]
    file = write_wmdp(tmp_path, [question(i, i % 4 if i < 9 else 2, said[i]) for i in range(10)])
    result = evaluate(tmp_path, ["wmdp_bio"])
    scores = result["results"]["wmdp_bio"]
    assert scores["acc,none"] == pytest.approx(0.8)
    assert scores["acc_stderr,none"] == pytest.approx(math.sqrt(0.8 * 0.2 / 9))
    assert [sample["acc"] for sample in result["samples"]["wmdp_bio"]] == [1.0] * 7 + [0.0, 1.0, 0.0]
    prompt, continuation = result["samples"]["wmdp_bio"][3]["arguments"][2]
    assert prompt == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "What is fact 3? #D\nA. it 0\nB. it 1\nC. it 2\nD. it 3\nAnswer:"
    )
    assert continuation == " C"
    assert result["unlearn"]["data"] == {"wmdp_bio": {str(file.relative_to(tmp_path)): file_hash(file)}}
    assert (result["unlearn"]["rows"], result["unlearn"]["requests"]) == (10, 40)


def test_mmlu_stem_is_the_mean_over_questions_of_its_19_subjects(tmp_path: Path) -> None:
    known = write_stem(tmp_path)
    result = evaluate(tmp_path, ["mmlu_stem"])
    assert set(result["samples"]) == {f"mmlu_{subject}" for subject in STEM} and len(STEM) == 19
    for subject, (size, right) in known.items():
        assert result["results"][f"mmlu_{subject}"]["acc,none"] == pytest.approx(right / size)
    questions, right = (sum(column) for column in zip(*known.values(), strict=True))
    assert result["groups"]["mmlu_stem"]["acc,none"] == pytest.approx(right / questions)
    assert result["groups"]["mmlu_stem"]["acc_stderr,none"] > 0.0
    assert result["n-samples"]["mmlu_anatomy"] == {"original": 3, "effective": 3}


def test_limit_takes_the_first_questions_of_each_subject(tmp_path: Path) -> None:
    write_stem(tmp_path)
    result = evaluate(tmp_path, ["mmlu_stem"], limit=1)
    assert result["groups"]["mmlu_stem"]["acc,none"] == 1.0
    assert all(len(samples) == 1 for samples in result["samples"].values())


def test_same_evaluation_runs_again_on_a_changed_model(tmp_path: Path) -> None:
    """The second run must not see the first one's responses, nor change the first one's result."""
    write_wmdp(tmp_path, [question(i, i % 4, None) for i in range(8)])
    tokenizer = make_tokenizer()
    evaluation = Evaluation(tokenizer, tasks=["wmdp_bio"], data_dir=tmp_path)
    first = evaluation.run(make_model("neox", seed=1))
    before = json.dumps(first["samples"], default=str)
    second = evaluation.run(make_model("neox", seed=2))
    assert json.dumps(first["samples"], default=str) == before
    fresh = Evaluation(tokenizer, tasks=["wmdp_bio"], data_dir=tmp_path).run(make_model("neox", seed=2))
    assert second["samples"] == fresh["samples"] and second["samples"] != first["samples"]
    assert [len(response) for sample in second["samples"]["wmdp_bio"] for response in sample["resps"]] == [1] * 32


def test_replaced_file_gives_its_new_rows(tmp_path: Path) -> None:
    """`datasets.load_dataset` on the folder returned the old rows."""
    write_wmdp(tmp_path, [question(i, 0, 0) for i in range(4)])
    old = evaluate(tmp_path, ["wmdp_bio"])
    write_wmdp(tmp_path, [question(i, 0, 1) for i in range(5)])
    new = evaluate(tmp_path, ["wmdp_bio"])
    assert (old["results"]["wmdp_bio"]["acc,none"], new["results"]["wmdp_bio"]["acc,none"]) == (1.0, 0.0)
    assert len(new["samples"]["wmdp_bio"]) == 5
    assert old["unlearn"]["data"] != new["unlearn"]["data"]


def test_ties_and_truncations_are_counted(tmp_path: Path) -> None:
    write_wmdp(tmp_path, [question(i, 0, 0) for i in range(4)])
    tokenizer = make_tokenizer()
    evaluation = Evaluation(tokenizer, tasks=["wmdp_bio"], data_dir=tmp_path, truncate=True)
    model = OracleModel(tokenizer)
    model.lm_head.weight.data.zero_()
    model.config.max_position_embeddings = 10
    result = evaluation.run(model)
    own = result["unlearn"]
    assert own["tie_rate"] == 1.0 and own["ties"] == {"wmdp_bio": 4}
    assert own["truncated_rows"] == 1, "the four questions end alike: cut to 10 tokens they are one row"
    assert result["results"]["wmdp_bio"]["acc,none"] == 1.0, "a tie goes to A"


def test_own_yaml_reads_local_data_and_scores_full_answers(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "cloze.yaml").write_text(CLOZE)
    write_questions(tmp_path / "embedded-world/questions/hazard", [question(i, 0, None) for i in range(3)])
    tokenizer = make_tokenizer()
    evaluation = Evaluation(tokenizer, tasks=["world_cloze"], data_dir=tmp_path, include_path=tmp_path / "tasks")
    result = evaluation.run(make_model("neox"))
    assert {"acc,none", "acc_norm,none"} <= set(result["results"]["world_cloze"])
    assert result["samples"]["world_cloze"][0]["arguments"][1] == ("Question: What is fact 0?\nAnswer:", " it 1")


def test_data_set_without_a_name_and_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "cloze.yaml").write_text(CLOZE.replace("dataset_name: hazard\n", ""))
    folder = tmp_path / "embedded-world/questions/data"
    for part in range(2):
        file = write_questions(folder, [question(part, 0, None)])
        file.rename(folder / f"test-0000{part}-of-00002.parquet")
    loaded = load_tasks(["world_cloze"], data_dir=tmp_path, include_path=tmp_path)
    task = loaded["tasks"]["world_cloze"]
    assert [row["question"] for row in task.eval_docs] == ["What is fact 0?", "What is fact 1?"]
    assert len(task.provenance) == 2


@pytest.mark.parametrize("names", [["1-of-00002"], ["0-of-00001", "1-of-00002"], ["0-of-00002", "0-of-00001"]])
def test_a_part_of_a_split_is_not_taken_for_the_whole(tmp_path: Path, names: list[str]) -> None:
    write_wmdp(tmp_path, [question(i, i % 4, None) for i in range(4)])
    whole = next(tmp_path.rglob("test-*.parquet"))
    content = whole.read_bytes()
    whole.unlink()
    for name in names:
        (whole.parent / f"test-0000{name}.parquet").write_bytes(content)
    with pytest.raises(UserError, match=f"one file or all parts of one split .* test-0000{sorted(names)[0]}.parquet"):
        evaluate(tmp_path, ["wmdp_bio"])


def test_few_shot_examples_need_their_split(tmp_path: Path) -> None:
    shots = CLOZE.replace("test_split: test", "test_split: test\nfewshot_split: dev\nnum_fewshot: 1")
    (tmp_path / "cloze.yaml").write_text(shots + "fewshot_config: {sampler: first_n}\n")
    folder = tmp_path / "embedded-world/questions/hazard"
    write_questions(folder, [question(0, 0, None)])
    with pytest.raises(UserError, match="hazard/dev-.*no such file"):
        load_tasks(["world_cloze"], data_dir=tmp_path, include_path=tmp_path)
    write_questions(folder, [question(7, 2, None)], split="dev")
    task = load_tasks(["world_cloze"], data_dir=tmp_path, include_path=tmp_path)["tasks"]["world_cloze"]
    task.build_all_requests()
    assert task.instances[0].args[0].startswith("Question: What is fact 7?\nAnswer: it 2\n\nQuestion: What is fact 0?")


def test_templates_are_compiled_once_within_the_block_only() -> None:
    from lm_eval.utils import env

    with compiled_templates():
        assert env.from_string("{{x}}") is env.from_string("{{x}}")
    assert env.from_string("{{x}}") is not env.from_string("{{x}}")


def test_unknown_task_names_close_matches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'wmdp_boi', which is unknown: did you mean wmdp_bio"):
        load_tasks(["wmdp_boi"], data_dir=tmp_path)


def test_missing_data_name_the_expected_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cais/wmdp/wmdp-bio/test-.*parquet; found no such file"):
        load_tasks(["wmdp_bio"], data_dir=tmp_path)
    with pytest.raises(UserError, match="--data-dir; found none"):
        load_tasks(["wmdp_bio"], data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(("content", "message"), [(b"PAR1 not really", "expected Parquet"), (None, "no rows")])
def test_damaged_and_empty_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = write_wmdp(tmp_path, [question(0, 0, 0)])
    if content is None:
        datasets.Dataset.from_dict({"question": [], "choices": [], "answer": []}).to_parquet(file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tasks(["wmdp_bio"], data_dir=tmp_path)


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'cais/wmdp' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="data set cais/wmdp/wmdp-bio of task wmdp_bio .* give --data-dir"):
        load_tasks(["wmdp_bio"])


def test_unsuitable_tasks_are_refused(tmp_path: Path) -> None:
    write_stem(tmp_path)
    (tmp_path / "text.yaml").write_text(CLOZE + "doc_to_image: picture\n")
    write_questions(tmp_path / "embedded-world/questions/hazard", [question(0, 0, None)])
    with pytest.raises(UserError, match="tasks on text .*; found world_cloze, .* multiple_choice with pictures"):
        load_tasks(["world_cloze"], data_dir=tmp_path, include_path=tmp_path)
    (tmp_path / "text.yaml").write_text("task: pythonic\nclass: !function nowhere.Nothing\n")
    with pytest.raises(UserError, match="found pythonic, a Python class"):
        load_tasks(["pythonic"], data_dir=tmp_path, include_path=tmp_path)
    (tmp_path / "text.yaml").write_text("group: mixture\ntask: [mmlu_stem, pythonic]\n")
    (tmp_path / "more.yaml").write_text("task: pythonic\nclass: !function nowhere.Nothing\n")
    with pytest.raises(UserError, match="found pythonic, a Python class"):
        load_tasks(["mixture"], data_dir=tmp_path, include_path=tmp_path)
    with pytest.raises(UserError, match="each task once.*with --subsample; found mmlu_anatomy"):
        load_tasks(["mmlu_stem", "mmlu_anatomy"], data_dir=tmp_path, subsample=19)
    with pytest.raises(UserError, match="at least one name"):
        load_tasks([], data_dir=tmp_path)
    with pytest.raises(UserError, match="--include-path; found none"):
        load_tasks(["wmdp_bio"], data_dir=tmp_path, include_path=tmp_path / "nowhere")


@pytest.mark.slow
def test_any_task_of_lm_eval_is_found_without_reading_all() -> None:
    """A task, a group whose members are elsewhere, and a tag; as lm-eval's own index has them."""
    from lm_eval.tasks import TaskManager

    from unlearn.evals.harness.task_loader import _leaves, _manager, _members

    everything = TaskManager()
    for name in ("hellaswag", "arc_challenge", "mmlu_pro", "ai2_arc", "mmlu_stem_tasks", "super-glue-lm-eval-v1"):
        index = _manager([name], None).task_index
        assert index[name].kind is everything.task_index[name].kind
        assert sorted(_members(index[name])) == sorted(_members(everything.task_index[name]))
        assert index[name].yaml_path == everything.task_index[name].yaml_path
        assert sorted(_leaves(name, index)) == sorted(_leaves(name, everything.task_index))
