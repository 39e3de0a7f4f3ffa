"""Question files: formats, shards, and what is wrong with them."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from evals_support import OracleModel, make_tokenizer, question, write_wmdp

from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.harness.local_data import LocalData
from unlearn.evals.harness.question_files import read_questions
from unlearn.evals.harness.question_task import QuestionTask
from unlearn.evals.harness.task_loader import load_tasks

ROWS = [question(i, i % 4, i % 4 if i < 5 else 0) for i in range(7)]
LETTERS_YAML = """
task: dated
dataset_path: own/dated
test_split: test
output_type: multiple_choice
doc_to_text: "{{title}} of {{date}}: {{question}}\\nA. {{a}}\\nB. {{b}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: answer
"""
DATED = [
    {"title": "2024-01-02", "date": "2023-12-31", "question": "Which?", "a": "NA", "b": "None", "answer": 1},
    {"title": "2024-01-03", "date": "1999-01-01", "question": "12:30:00", "a": "007", "b": "nan", "answer": 0},
]
DATED_PROMPT = "2024-01-02 of 2023-12-31: Which?\nA. NA\nB. None\nAnswer:"


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_gz(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_json(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "test.jsonl": write_jsonl,
    "test-00000-of-00001.jsonl": write_jsonl,
    "test.JSONL": write_jsonl,
    "test.jsonl.gz": write_gz,
    "test.json": write_json,
}


@pytest.mark.parametrize("name", WRITERS)
def test_question_files_of_other_formats_give_the_same_numbers(tmp_path: Path, name: str) -> None:
    """Only Parquet was read."""
    write_wmdp(tmp_path / "parquet", ROWS)
    folder = tmp_path / "other/cais/wmdp/wmdp-bio"
    folder.mkdir(parents=True)
    WRITERS[name](folder / name, ROWS)
    tokenizer = make_tokenizer()
    found = [
        Evaluation(tokenizer, tasks=["wmdp_bio"], data_dir=tmp_path / place).run(OracleModel(tokenizer))
        for place in ("parquet", "other")
    ]
    assert found[0]["samples"] == found[1]["samples"]
    assert list(found[1]["unlearn"]["data"]["wmdp_bio"]) == [f"cais/wmdp/wmdp-bio/{name}"]


def load_dated(tmp_path: Path, yaml: str = LETTERS_YAML, **options: Any) -> QuestionTask:
    (tmp_path / "tasks").mkdir(exist_ok=True)
    (tmp_path / "tasks/dated.yaml").write_text(yaml)
    task: QuestionTask = load_tasks(["dated"], include_path=tmp_path / "tasks", **options)["tasks"]["dated"]
    task.build_all_requests()
    return task


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv"])
def test_texts_stay_as_they_are_written(tmp_path: Path, name: str) -> None:
    """ "2024-01-02" became "2024-01-02 00:00:00" in the prompt, and the answers "NA" and "None" nothing."""
    (tmp_path / "own/dated").mkdir(parents=True)
    (write_csv if name.endswith("csv") else write_jsonl)(tmp_path / "own/dated" / name, DATED)
    task = load_dated(tmp_path, data_dir=tmp_path)
    assert task.instances[0].args == (DATED_PROMPT, " A") and task.instances[2].args[0].endswith(
        "A. 007\nB. nan\nAnswer:"
    )
    assert [key.right for key in task.keys] == [(1,), (0,)]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_files_named_in_a_yaml_start_from_its_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were looked for in the working directory, and their dates were read as such."""
    (tmp_path / "tasks/files").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tasks/files")
    suffix = {"json": "jsonl", "csv": "csv"}[kind]
    (write_csv if kind == "csv" else write_jsonl)(tmp_path / f"tasks/files/rows.{suffix}", DATED)
    yaml = LETTERS_YAML.replace("own/dated", kind) + f"dataset_kwargs: {{data_files: {{test: files/rows.{suffix}}}}}\n"
    task = load_dated(tmp_path, yaml)
    assert task.instances[0].args == (DATED_PROMPT, " A")
    assert list(task.provenance) == [str(tmp_path / f"tasks/files/rows.{suffix}")]
    with pytest.raises(UserError, match=f"tasks/files/gone.{suffix} of task dated; found none: check data_files"):
        load_dated(tmp_path, yaml.replace("rows", "gone"))


def test_shards_may_differ_in_width_order_and_further_columns(tmp_path: Path) -> None:
    """int32 beside int64, string beside large_string, another order and one column more were refused."""
    folder = tmp_path / "cais/wmdp/wmdp-bio"
    folder.mkdir(parents=True)
    rows = [pyarrow.Table.from_pylist(part) for part in (ROWS[:3], ROWS[3:])]
    first = rows[0].set_column(2, "answer", rows[0]["answer"].cast(pyarrow.int32()))
    second = rows[1].set_column(0, "question", rows[1]["question"].cast(pyarrow.large_string()))
    second = second.select(["answer", "choices", "question"]).append_column("more", pyarrow.array([{"x": 1}] * 4))
    maps = pyarrow.array([[("a", 1)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    for place, table in enumerate([first, second.append_column("map", maps)]):
        pyarrow.parquet.write_table(table, folder / f"test-0000{place}-of-00002.parquet")
    tokenizer = make_tokenizer()
    result = Evaluation(tokenizer, tasks=["wmdp_bio"], data_dir=tmp_path).run(OracleModel(tokenizer))
    assert [sample["doc"]["question"] for sample in result["samples"]["wmdp_bio"]] == [row["question"] for row in ROWS]
    assert result["results"]["wmdp_bio"]["acc,none"] == pytest.approx(5 / 7)
    strange = second.set_column(0, "answer", pyarrow.array(["x"] * 4))
    pyarrow.parquet.write_table(strange, folder / "test-00001-of-00002.parquet")
    with pytest.raises(UserError, match="the same columns in test-00000-of-00002.parquet, test-00001"):
        load_tasks(["wmdp_bio"], data_dir=tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_whole_numbers_beside_fractions_are_refused(tmp_path: Path, nested: bool) -> None:
    """A file of whole numbers beside one with fractions was read as fractions: the choice 1 became 1.0."""
    for place, numbers in enumerate([[1, 2], [2.5, 3.5]]):
        rows = [{"question": "q", "choices": numbers}] if nested else [{"question": "q", "choices": n} for n in numbers]
        write_jsonl(tmp_path / f"test-0000{place}-of-00002.jsonl", rows)
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="one kind of numbers in the column choices.* whole ones in test-00000-of"):
        read_questions(files)
    write_jsonl(files[1], [{"question": "q", "choices": [3, 4] if nested else 3, "more": 0.5}])
    assert read_questions(files)["choices"].to_pylist() == ([[1, 2], [3, 4]] if nested else [1, 2, 3])


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["test.jsonl", "test-small.jsonl", "test-hard.jsonl"], ["test.jsonl"]),
        (["test.jsonl", "test-small.parquet", "test.small.jsonl"], ["test.jsonl"]),
        (["test-00000-of-00001-a09b74b3.jsonl", "test-small.jsonl"], ["test-00000-of-00001-a09b74b3.jsonl"]),
        (["test-some.jsonl"], ["test-some.jsonl"]),
        (["test.small.jsonl"], []),
        (["test-small.jsonl", "test-hard.jsonl"], None),
        (["test.jsonl", "test.parquet"], None),
        (["test.jsonl", "data/test.jsonl"], None),
        (["test.jsonl", "test-00000-of-00001.jsonl"], None),
        (["test-00000-of-00001.jsonl", "test-00000-of-00001.csv"], None),
        (["test-00000-of-00002.jsonl", "test-00001-of-00002.csv"], None),
    ],
)
def test_which_files_are_the_split(tmp_path: Path, names: list[str], chosen: list[str] | None) -> None:
    """Of test.jsonl beside test-small.jsonl the wrong one was read, and an old Parquet file won over an edited JSON."""
    for name in names:
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text("{}")
    if chosen is not None:
        assert [file.name for file in LocalData(tmp_path).files("own", None, "test")] == chosen
        return
    with pytest.raises(UserError, match="expected one file or all parts of one split in .*/own") as error:
        LocalData(tmp_path).files("own", None, "test")
    assert all(Path(name).name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        ("test.jsonl", b'{"question": "Which?"\n', "expected JSON in"),
        ("test.jsonl", b'["Which?"]\n{"question": 1}\n', "one object with the columns"),
        ("test.jsonl", b'{"question": "Which?"}\n{"question": ["Which?"]}\n', "expected JSON in"),
        ("test.jsonl", '{"question": "\xe4"}'.encode("latin-1"), "expected JSON in"),
        ("test.csv", b"question,answer\nWhich?,1\nWhat?\n", "as many fields as columns .* row 2"),
        ("test.jsonl.gz", b"{}", "expected JSON in"),
        ("test.jsonl.gz", gzip.compress(b'{"question": "Which?"}', mtime=0)[:20] + bytes(20), "expected JSON in"),
        ("test.jsonl", b'{"question": "Which?", "answer": 0, "answer": 1}\n', "the key 'answer' twice in one object"),
        ("test.jsonl", b"", "no rows"),
    ],
)
def test_damaged_question_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "cais/wmdp/wmdp-bio").mkdir(parents=True)
    (tmp_path / "cais/wmdp/wmdp-bio" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tasks(["wmdp_bio"], data_dir=tmp_path)


def test_a_data_set_that_is_a_script_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback of the library's."""

    def refuse(**_: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found dated.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="data set own/dated of task dated as files of questions; found a script"):
        load_dated(tmp_path)
