"""Two evaluations of the same questions: `unlearn.evals.judge.paired`, `python evals/pair.py`, and `--baseline`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evals_samples import ABCD, answering, gather, sample

from unlearn.errors import UserError
from unlearn.evals import pair as command
from unlearn.evals.judge.answers import Letters
from unlearn.evals.judge.paired import Record, compare, read_record, table
from unlearn.evals.judge.stats import mcnemar


def record(right: dict[str, list[int]], groups: dict[str, list[str]] | None = None, source: str = "there") -> Record:
    """A model that answers these questions right (1) or wrong (0)."""
    questions = {
        task: gather(
            answering([(i + 1 - one) % 4 for i, one in enumerate(values)], [i % 4 for i in range(len(values))])
        )
        for task, values in right.items()
    }
    return Record(source, {task: found.record() for task, found in questions.items()}, groups or {})


def write(folder: Path, made: Record) -> Path:
    folder.mkdir(parents=True)
    content = {"unlearn": {"questions": made.questions}, "group_subtasks": made.groups}
    (folder / "results_2026.json").write_text(json.dumps(content))
    return folder


def test_counts_and_p_value() -> None:
    base, new = record({"task": [1] * 60 + [0] * 40}), record({"task": [1] * 45 + [0] * 15 + [1] * 5 + [0] * 35})
    found = compare(base, new)["task"]
    assert (found["base"], found["new"], found["difference"]) == (0.6, 0.5, pytest.approx(-0.1))
    assert (found["only_base"], found["only_new"], found["questions"]) == (15, 5, 100)
    assert found["p"] == mcnemar(15, 5)
    low, high = found["interval"]
    assert low < -0.1 < high < 0.0


def test_groups_are_stratified() -> None:
    """In one subject all is lost, in the other all is won: nothing is left to chance."""
    base = record({"a": [1] * 30, "b": [0] * 30}, {"both": ["a", "b"]})
    new = record({"a": [0] * 30, "b": [1] * 30}, {"both": ["a", "b"]})
    found = compare(base, new)
    assert found["both"]["interval"] == [0.0, 0.0] and found["a"]["difference"] == -1.0
    assert found["both"]["base"] == found["both"]["new"] == 0.5


def test_non_inferiority() -> None:
    rng = random.Random(0)
    base = [int(rng.random() < 0.4) for _ in range(3000)]
    slightly = [0 if one and rng.random() < 0.005 else one for one in base]
    badly = [0 if one and rng.random() < 0.2 else one for one in base]
    few = [0 if index == 0 else one for index, one in enumerate([1] * 30)]

    def judged(old: list[int], now: list[int]) -> tuple[bool, bool]:
        one = compare(record({"task": old}), record({"task": now}), margin=0.01)["task"]
        return one["non_inferior"], one["inferior"]

    assert judged(base, slightly) == (True, False)
    assert judged(base, badly) == (False, True)
    assert judged([1] * 30, few) == (False, False), "thirty questions cannot say"
    assert "cannot say" in table(compare(record({"task": [1] * 30}), record({"task": few})))


def test_equal_answers_to_few_questions_prove_nothing() -> None:
    """A bootstrap of 24 equal answers has no width, and called that non-inferior."""
    found = compare(record({"task": [1] * 24}), record({"task": [1] * 24}))["task"]
    assert found["method"] == "score" and found["interval"][0] < -0.1 and not found["non_inferior"]
    many = compare(record({"task": [1] * 1000}), record({"task": [1] * 1000}))["task"]
    assert many["non_inferior"]


def test_orders_are_averaged() -> None:
    letters = Letters(ABCD.names, orders=4)
    rows = [[float(place == 2) for place in range(4)]] * 4
    always_c = gather([sample(row, (0 - s) % 4, "q") for s, row in enumerate(rows)], letters)
    right = gather([sample([float(p == (0 - s) % 4) for p in range(4)], (0 - s) % 4, "q") for s in range(4)], letters)
    found = compare(Record("", {"t": right.record()}, {}), Record("", {"t": always_c.record()}, {}))["t"]
    assert found["questions"] == 1 and found["base"] == 1.0 and found["new"] == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("task"), "same tasks in there; found none of task among other"),
        (lambda q: q["task"]["ids"].pop(), "task task; found 8 here and 7 there"),
        (lambda q: q["task"]["ids"].reverse(), "found them in another order"),
        (lambda q: q["task"]["ids"].__setitem__(3, "0" * 16), "found 1 of 8 changed: evaluate both .* question files"),
        (lambda q: q["task"]["prompts"].__setitem__(3, "0" * 16), "the prompts of .* 1 of 8 changed: .* definition"),
    ],
)
def test_other_questions_are_refused(change: Any, message: str) -> None:
    base, new = record({"task": [1] * 8, "other": [1] * 4}), record({"task": [0] * 8})
    change(base.questions)
    with pytest.raises(UserError, match=message):
        compare(base, new)


def test_command_prints_and_draws(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    base = write(tmp_path / "base", record({"a": [1] * 30, "b": [0, 1] * 20}, {"both": ["a", "b"]}))
    new = write(tmp_path / "new" / "model", record({"a": [0, 1] * 15, "b": [0, 1] * 20}, {"both": ["a", "b"]}))
    figure = tmp_path / "figures" / "compare.png"
    assert run_here(command.main, base, tmp_path / "new", "--figure", figure) == 0
    printed = capsys.readouterr().out
    assert "-50.0" in printed and "+0.0 [-8.8, +8.8]" in printed and str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert run_here(command.main, base, new, "--figure", figure) == 2, "an earlier figure is kept"


def test_mistakes_of_the_command(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good", record({"task": [1] * 8}))
    (tmp_path / "interrupted" / "model").mkdir(parents=True)
    (tmp_path / "interrupted" / "model" / "results_2026.json.tmp").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results_1.json").write_text('{"results": {}}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results_1.json").write_text('{"results": ')
    twice = write(tmp_path / "twice", record({"task": [1] * 8}))
    (twice / "results_2027.json").write_text((twice / "results_2026.json").read_text())
    other = write(tmp_path / "other", record({"another": [1] * 8}))
    for bad, message in [
        (tmp_path / "interrupted", "an interrupted run leaves none"),
        (tmp_path / "foreign", "found none of their keys"),
        (tmp_path / "damaged", "expected readable results"),
        (tmp_path / "nowhere", "found nothing"),
        (twice, "found 2: give one of them"),
        (other, "found none of task among another"),
    ]:
        assert run_here(command.main, bad, good, "--figure", tmp_path / "x.png") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert run_here(command.main, good, good, "--figure", tmp_path / "x.gif") == 2
    assert run_here(command.main, good, good, "--margin", 0, "--figure", tmp_path / "x.png") == 2


def test_record_is_what_the_file_holds(tmp_path: Path) -> None:
    made = record({"task": [1, 0, 1, 1]})
    read = read_record(write(tmp_path / "there", made) / "results_2026.json")
    assert read.questions == made.questions and compare(read, made)["task"]["p"] == 1.0
