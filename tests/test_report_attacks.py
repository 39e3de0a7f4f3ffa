"""What the page of a run says of the attacks on it, and of the commands that made it."""

from pathlib import Path
from typing import Any

import pytest
from report_support import make_run, numbers, report, result, write

from unlearn.errors import UserError
from unlearn.files import files_hash


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def attacked_grid(model: str) -> dict[str, Any]:
    """attack.json of a grid: two attacks on the model, one on the original, facts that were attacked and not."""

    def points(first: float, *others: float) -> list[dict[str, Any]]:
        values = enumerate((first, *others))
        return [{"step": 10 * n, "tokens": 1000 * n, "tasks": {"wmdp_bio": numbers(acc)}} for n, acc in values]

    def best(step: int, acc: float | None) -> dict[str, Any]:
        interval = None if acc is None else [acc - 0.1, acc + 0.1]
        return {"step": step, "attacker": "a", "acc": acc, "interval": interval, "measured": 2, "counted": 2}

    recovered = {"steps": 10, "tokens": 1000, "steps_by": "a", "tokens_by": "a"}
    censored = {"steps": None, "tokens": None, "censored": "not within 20 steps or 2,000 tokens by any of 2 attack(s)"}
    subjects = {
        "unlearned": {
            "model": model,
            "attacks": {"a": {"points": points(0.3, 0.55, 0.7)}, "b": {"points": points(0.3, 0.4, 0.45)}},
            "envelope": {"wmdp_bio": [best(0, 0.3), best(10, 0.55), best(20, 0.7)]},
            "recovery": {"wmdp_bio": {"0.5": recovered, "0.9": censored}},
        },
        "original": {
            "model": "base/model",
            "attacks": {"a": {"points": points(0.9, 0.9)}},
            "envelope": {"wmdp_bio": [best(0, 0.9), best(10, None)]},
            "recovery": {"wmdp_bio": {"0.5": recovered | {"steps": 0, "tokens": 0}}},
        },
        "random": {
            "model": "base/model",
            "attacks": {"a": {"points": points(0.25, 0.25)}},
            "envelope": {"wmdp_bio": [best(0, None), best(10, None)]},
            "recovery": {},
        },
    }
    return {
        "config": {"model": model},
        "warnings": ["the attack text holds 3 of the questions"],
        "points_of": "a",
        "points": subjects["unlearned"]["attacks"]["a"]["points"],  # type: ignore[index]
        "hazard": ["wmdp_bio"],
        "general": [],
        "gap": {"wmdp_bio": {"start": 0.3, "reference": 0.9, "bounds": {"0.5": 0.6, "0.9": 0.84}}},
        "subjects": subjects,
    }


def test_a_grid_of_attacks_stands_beside_its_controls(run: Path) -> None:
    write(run.parent / "some-attack/attack.json", attacked_grid(str(run / "model")))
    page, _ = report(run)
    assert page.text.index("the attack text holds 3 of the questions") < page.text.index("Accuracy")
    assert "Unlearning took it from 90.0 % to 30.0 %" in page.text
    for row in (
        "unlearned 2 attacks 30.0 % 20.0–40.0 70.0 % 60.0–80.0 20 10 steps, 1,000 tokens not within 20 steps",
        "original 1 attack 90.0 % 80.0–100.0 none keeps general accuracy – 0 steps, 0 tokens –",
        "random 1 attack 25.0 % 15.0–35.0 none keeps general accuracy – – –",
    ):
        assert row in page.text
    assert {"unlearned, best of 2", "original, best of 1"} <= set(page.words) and "random, best of 1" not in page.words
    assert "of its 2 the strongest, a" in page.text and page.elements.count("figure") == 10


@pytest.mark.parametrize(
    ("gap", "said"),
    [({}, "No gap to recover is known"), ({"start": 0.3, "reference": 0.3, "reason": "not apart"}, "not apart")],
)
def test_an_attack_without_a_gap_still_has_its_page(run: Path, gap: dict[str, Any], said: str) -> None:
    attack = attacked_grid(str(run / "model")) | {"gap": {"wmdp_bio": gap} if gap else {}}
    for subject in attack["subjects"].values():
        subject["recovery"] = {"wmdp_bio": {}} if gap else {}
    write(run.parent / "some-attack/attack.json", attack)
    page, _ = report(run)
    assert said in page.text and "Unlearning took it from" not in page.text
    assert "unlearned 2 attacks 30.0 % 20.0–40.0 70.0 % 60.0–80.0 20" in page.text


def test_what_was_measured_on_other_weights_of_the_same_name_is_refused(run: Path) -> None:
    (run / "model/model.safetensors").write_bytes(b"these weights")
    now = files_hash([run / "model/model.safetensors"])
    own = run / "evals/own/results_2.json"
    write(own, result(str(run / "model"), {"wmdp_bio": numbers(0.375)}, model_sha256="0ld" * 20))
    with pytest.raises(UserError, match="results_2.json to be of this run's weights .* others .0ld0ld"):
        report(run)
    write(own, result(str(run / "model"), {"wmdp_bio": numbers(0.375)}, model_sha256=now))
    write(run.parent / "some-attack/attack.json", attacked_grid(str(run / "model")))
    write(run.parent / "some-attack/run.json", {"identity": {"model": "0ld" * 20}, "attempts": []})
    with pytest.raises(UserError, match="some-attack to be of this run's weights"):
        report(run)
    write(run.parent / "some-attack/run.json", {"identity": {"model": now}, "attempts": []})
    report(run)


def test_commands_and_digests_come_from_the_run_itself(run: Path) -> None:
    facts = {"command": "torchrun --nproc_per_node 2 train.py --x", "code": "c0de", "versions": {"torch": "9.9"}}
    write(run / "run.json", {"identity": {"forget corpus": "beef" * 16}, "attempts": [facts | {"ranks": 2}]})
    evaluated = result(str(run / "model"), {"wmdp_bio": numbers(0.375)}, command="python evals/run.py --y")
    write(run / "evals/own/results_2.json", evaluated)
    page, _ = report(run)
    for words in ("torchrun --nproc_per_node 2 train.py --x", "python evals/run.py --y", "beef" * 16, "c0de", "9.9"):
        assert words in page.text
    assert "python evals/tamper.py --model" in page.text, "an attack without run.json is told by its flags"
