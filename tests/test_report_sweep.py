"""The page of a sweep."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_support import make_run, numbers, report, result, write

from unlearn.errors import UserError
from unlearn.launch.report import write_report
from unlearn.launch.report.config import ReportConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def trial(number: int, hazard: float, general: float, **more: Any) -> dict[str, Any]:
    """A measured line of trials.jsonl."""
    one = {"target": "wmdp_bio<=0.3", "collapse": None}
    return {
        "trial": f"{number:03d}-remove-coef{number}-seed0",
        "number": number,
        "values": {"remove-coef": str(number)},
        "seed": 0,
        "state": "push harder",
        "commands": [f"python train.py --remove-coef {number} --seed 0"],
        "steps": 3,
        "losses": {"forget_loss": 1.5, "retain_loss": 0.25},
        "questions": "all",
        "accuracies": {"wmdp_bio": numbers(hazard), "mmlu_stem": numbers(general)},
        "verdict": {"by_point": "not met", "by_interval": "not met", "words": "verdict: words", "targets": [one]},
    } | more


@pytest.fixture
def sweep(run: Path, tmp_path: Path) -> Path:
    """A sweep that met its target by its third trial, whose run is `run`, and which was attacked; one trial failed."""
    folder = tmp_path / "sweep"
    failed = {"state": "failed", "reason": "found NaN at step 3"}
    met = {"by_point": "met", "by_interval": "met", "words": "verdict: met", "targets": [{"collapse": None}]}
    trials = [trial(1, 0.5, 0.55), trial(2, 0.0, 0.0, **failed), trial(3, 0.25, 0.5, state="met", verdict=met)]
    for key in ("accuracies", "verdict", "losses", "questions"):
        del trials[1][key]
    flags = {"search": "grid", "grid": ["remove-coef=1,2,3"], "target": ["wmdp_bio<=0.3", "mmlu_stem>=0.4"]}
    write(folder / "sweep.json", flags | {"tasks": ["wmdp_bio", "mmlu_stem"]})
    (folder / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in trials))
    outcome = "The target is met, with 1 of 1 seeds, by --remove-coef 3 after 3 trials."
    write(folder / "best.json", {"outcome": outcome, "trials": 3, "best": trials[2]})
    tasks = {"wmdp_bio": numbers(0.9), "mmlu_stem": numbers(0.6)}
    write(folder / "before/results_0.json", result("base/model", tasks))
    place = folder / "trials" / trials[2]["trial"]
    place.mkdir(parents=True)
    run.rename(place / "run")
    (place / "run/evals/own/results_2.json").unlink()
    tasks = {"wmdp_bio": numbers(0.25), "mmlu_stem": numbers(0.5)}
    write(place / "all/results_3.json", result(str(place / "run/model"), tasks, verdict=met))
    points = [{"step": step, "tasks": {"wmdp_bio": numbers(0.3 + step / 100)}} for step in (0, 20)]
    for name, attacked in (("attack", trials[2]["trial"]), ("another", trials[0]["trial"])):
        config = {"model": str(folder / "trials" / attacked / "run/model")}
        write(tmp_path / name / "attack.json", {"config": config, "points": points})
    return folder


def test_a_sweep_says_why_it_ended_before_any_number(sweep: Path) -> None:
    page, _ = report(sweep)
    assert page.text.index("The target is met, with 1 of 1 seeds") < page.text.index("python train.py")
    assert "Best: trial 3, --remove-coef 3 --seed 0" in page.text
    for row in (
        "before – – – – 90.0 % 80.0–100.0 60.0 % 50.0–70.0",
        "1 1 0 1.5 0.25 50.0 % 40.0–60.0 55.0 % 45.0–65.0 not met",
        "2 2 0 – – – – failed: found NaN at step 3",
        "3 3 0 1.5 0.25 25.0 % 15.0–35.0 50.0 % 40.0–60.0 met; met by interval",
    ):
        assert row in page.text
    failed = page.text.index("Failed trials")
    assert "found NaN at step 3 python train.py --remove-coef 2 --seed 0" in page.text[failed:]
    assert "The best trial's commands python train.py --remove-coef 3 --seed 0" in page.text


def test_a_sweep_shows_the_best_trials_run_and_the_attack_on_it(sweep: Path) -> None:
    page, text = report(sweep)
    assert "The best trial's run: 003-remove-coef3-seed0" in page.text
    stages = page.text[page.text.index("The best trial's run") :]
    assert "wmdp_bio 90.0 % 80.0–100.0 of 40 25.0 % 15.0–35.0 of 40 50.0 % 40.0–60.0 of 40" in stages
    assert str(sweep.parent / "attack/attack.json") in text and "another" not in text
    assert page.elements.count("figure") > 8 and "Each trial by its number" in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_opens_it_without_an_error_or_a_request(sweep: Path) -> None:
    """The page forbids itself every request, so that the browser complains of one as of any other error."""
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    _, text = report(sweep)
    (sweep / "broken.html").write_text(text.replace("</body>", "<img src='http://127.0.0.1:9/x.png'></body>"))
    for name, complaints in (("report.html", False), ("broken.html", True)):
        result = subprocess.run([*words, f"file://{sweep / name}"], capture_output=True, text=True, timeout=60)
        assert "The best trial" in result.stdout and result.stdout.rstrip().endswith("</html>")
        assert ("CONSOLE" in result.stderr) == complaints, result.stderr


def test_a_trial_that_was_begun_is_said(sweep: Path) -> None:
    (sweep / "trials/004-remove-coef9-seed0").mkdir()
    page, _ = report(sweep)
    assert "trials/004-remove-coef9-seed0 was begun and has not come to its end" in page.text


def test_a_sweep_that_is_still_going_on(sweep: Path) -> None:
    """Killed after a trial and before the results: what best.json says is then of fewer trials."""
    with (sweep / "trials.jsonl").open("a") as stream:
        stream.write(json.dumps(trial(4, 0.4, 0.5)) + "\n")
        stream.write('{"trial": "00')
    page, _ = report(sweep)
    assert "The sweep is not at its end" in page.text and "The target is met" not in page.text
    assert "4 4 0 1.5 0.25 40.0 %" in page.text


def test_a_sweep_without_a_trial(sweep: Path) -> None:
    (sweep / "trials.jsonl").unlink()
    (sweep / "best.json").unlink()
    page, _ = report(sweep)
    assert "No trial has ended" in page.text and "The sweep is not at its end" in page.text


def test_the_best_trials_run_may_be_gone(sweep: Path) -> None:
    shutil.rmtree(sweep / "trials")
    page, _ = report(sweep)
    assert "the best trial's run, is not there" in page.text and "25.0 %" in page.text


def test_a_sweeps_page_escapes_what_it_prints(sweep: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=http://x.example/y onerror=z>\x07$x_1$&amp;{{ 7*7 }}\u202e"
    shutil.rmtree(sweep / "trials")
    flags = json.loads((sweep / "sweep.json").read_text())
    write(sweep / "sweep.json", flags | {"grid": [evil], "search": evil})
    lines = [trial(1, 0.5, 0.5, trial=evil, values={evil: evil}, commands=[evil])]
    lines.append(trial(2, 0.5, 0.5, state="failed", reason=evil, values={evil: evil}, commands=[evil]))
    (sweep / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(sweep / "best.json", {"outcome": evil, "trials": 2, "best": lines[0]})
    page, text = report(sweep)
    assert "img" not in page.elements and "<script" not in text and "\u202e" not in text and "\x07" not in text
    assert page.text.count("<script>alert(1)</script>") > 8


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("sweep.json", "{", "expected JSON in"),
        ("trials.jsonl", '{"trial": "a"}\n', "expected a trial on every line of"),
        ("trials.jsonl", "x\n{}\n", "found none on line 1"),
        ("best.json", "[]", "expected an object in"),
    ],
)
def test_a_damaged_sweep_is_one_sentence(sweep: Path, file: str, content: str, found: str) -> None:
    (sweep / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(found)) as error:
        write_report(ReportConfig(str(sweep)))
    assert "\n" not in str(error.value)


def test_flags_that_a_sweep_cannot_use_are_refused(sweep: Path) -> None:
    with pytest.raises(UserError, match="--prompts has no effect on"):
        write_report(ReportConfig(str(sweep), prompts=("a",)))
    shutil.rmtree(sweep / "trials")
    with pytest.raises(UserError, match="--evals and --attacks have no effect"):
        write_report(ReportConfig(str(sweep), attacks=(str(sweep.parent / "attack"),)))


def test_a_trials_folder_is_neither_a_run_nor_a_sweep(sweep: Path) -> None:
    place = sweep / "trials/003-remove-coef3-seed0"
    with pytest.raises(UserError, match=re.escape(f"found a trial's at {place}: give {place / 'run'}")):
        write_report(ReportConfig(str(place)))
    shutil.rmtree(place / "run")
    with pytest.raises(UserError, match="found neither at"):
        write_report(ReportConfig(str(place)))
