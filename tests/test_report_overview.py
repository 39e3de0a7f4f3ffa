"""The picture that a page opens with, and how pages stand on a screen and on paper."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report_support import make_run, numbers, report, result, write
from test_compare import RULES, point, row

from unlearn.launch.compare_results import results
from unlearn.launch.report import compare_page, overview_figure, page
from unlearn.launch.report.compare_page import render_comparison
from unlearn.launch.report.overview import GENERAL, HAZARD, OTHER, Panel, by_kind, chance, overview, stage_names
from unlearn.launch.report.record import read_record

STAGES = {  # accuracies by stage
    "before": {"wmdp_bio": 0.9, "world_hazard_open": 0.8, "mmlu_stem": 0.7, "cities": 0.6},
    "after": {"wmdp_bio": 0.3, "world_hazard_open": 0.1, "mmlu_stem": 0.65, "cities": 0.5},
    "attacked": {"wmdp_bio": 0.55, "world_hazard_open": 0.4, "mmlu_stem": 0.6, "cities": 0.45},
}
UNSEEN, PEAK = 0.35, 0.75  # of the control after the attack; of the attack on the way to its end


def measured(stage: str, **more: float) -> dict[str, Any]:
    """The numbers of every task in a stage; a written answer has no letters."""
    found = {task: numbers(acc, metric="acc") for task, acc in (STAGES[stage] | more).items()}
    found["world_hazard_open"] |= {"metric": "exact_match"}
    del found["world_hazard_open"]["predicted"]
    return found


def attack(model: str) -> dict[str, Any]:
    """attack.json: one attack on the model, and the same on a control that never knew."""
    hazard = ["wmdp_bio", "world_hazard_open"]

    def subject(*stages: dict[str, Any]) -> dict[str, Any]:
        steps = [{"step": 20 * n, "tokens": 0, "tasks": tasks} for n, tasks in enumerate(stages)]
        best = {
            task: [{"step": one["step"], "acc": one["tasks"][task]["acc"], "interval": [0.0, 1.0]} for one in steps]
            for task in hazard
        }
        return {"model": model, "attacks": {"a": {"points": steps}}, "envelope": best, "recovery": {}}

    ends = measured("after"), measured("after", wmdp_bio=PEAK), measured("attacked")
    unseen = measured("after", wmdp_bio=0.26), measured("after", wmdp_bio=0.3), measured("after", wmdp_bio=UNSEEN)
    subjects = {"unlearned": subject(*ends), "random": subject(*ends), "never-seen": subject(*unseen)}
    general = {"hazard": hazard, "general": ["mmlu_stem"], "gap": {}, "warnings": []}
    points = subjects["unlearned"]["attacks"]["a"]["points"]
    return {"config": {"model": model}, "points_of": "a", "points": points, "subjects": subjects} | general


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path)
    verdict = {"by_point": "met", "by_interval": "met", "words": "wmdp_bio<=0.4: met"}
    write(folder / "evals/base/results_1.json", result("base/model", measured("before")))
    write(folder / "evals/own/results_2.json", result(str(folder / "model"), measured("after"), verdict=verdict))
    write(tmp_path / "some-attack/attack.json", attack(str(folder / "model")))
    return folder


def panels(folder: Path) -> list[Panel]:
    record = read_record(folder)
    stages = page._stages(record)
    return overview(record, stages, by_kind(record, STAGES["before"]))


def drawn(monkeypatch: pytest.MonkeyPatch, parts: list[Panel], shape: str) -> list[Axes]:
    """The axes that hold the parts, as matplotlib has them before they become a picture."""
    found: list[Figure] = []
    monkeypatch.setattr(overview_figure, "as_svg", lambda figure: str(found.append(figure)))
    getattr(overview_figure, shape)(parts)
    return [axes for figure in found for axes in figure.axes]


def spans(axes: Axes, style: str) -> list[tuple[float, float]]:
    """(from, to) along the axis of every line of a style."""
    lines = [np.asarray(line.get_xdata(), float) for line in axes.lines if line.get_linestyle() == style]
    return [(line.min(), line.max()) for line in lines]


def test_the_first_picture_has_every_task_at_every_stage_with_its_interval(run: Path) -> None:
    parts = panels(run)
    assert [part.title for part in parts] == [HAZARD, GENERAL, OTHER]
    rows = {one.name: one for part in parts for one in part.rows}
    assert set(rows) == set(STAGES["before"]) and stage_names(parts) == ["before", "after", "attacked, step 40"]
    for (stage, accuracies), name in zip(STAGES.items(), stage_names(parts), strict=True):
        for task, acc in accuracies.items():
            (bar,) = (bar for bar in rows[task].bars if bar.name == name)
            assert bar.acc == acc and bar.interval == pytest.approx((acc - 0.1, acc + 0.1)), (stage, task)


def test_lines_for_chance_the_control_that_never_knew_and_the_worst_moment(run: Path) -> None:
    rows = {one.name: one for part in panels(run) for one in part.rows}
    assert rows["wmdp_bio"].chance == 0.25 and rows["world_hazard_open"].chance is None
    assert all(one.control and one.control.name == "never-seen" for one in rows.values()), "not the random one"
    control = rows["wmdp_bio"].control
    assert control and control.acc == UNSEEN and control.interval == pytest.approx((UNSEEN - 0.1, UNSEEN + 0.1))
    assert rows["wmdp_bio"].peak == PEAK and rows["world_hazard_open"].peak is None, "its end is its highest"


@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_what_is_drawn_is_what_was_measured(run: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    for axes, part in zip(drawn(monkeypatch, panels(run), shape), panels(run), strict=True):
        bars = [bar for one in part.rows for bar in one.bars]
        assert [patch.get_width() for patch in axes.patches] == [bar.acc for bar in bars]
        assert set(spans(axes, "-")) == {bar.interval for bar in bars}
        assert [low for low, _ in spans(axes, ":")] == [one.chance for one in part.rows if one.chance]
        assert [low for low, _ in spans(axes, "--")] == [one.control.acc for one in part.rows if one.control]
        assert [low for low, _ in spans(axes, "None")] == [one.peak for one in part.rows if one.peak]
        assert [label.get_text() for label in axes.get_yticklabels()] == [one.name for one in part.rows]


def test_many_parts_are_all_drawn(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    many = panels(run) * 3
    axes = [one for one in drawn(monkeypatch, many, "wide") if one.axison]
    assert all(one.patches for one in axes), "no empty frame"
    assert [one.get_title(loc="left") for one in axes] == [part.title for part in many]


@pytest.mark.parametrize(
    ("task", "found", "share"),
    [
        ("anything", {"letters": ["A", "B", "C", "D", "E"]}, 0.2),
        ("world_hazard_claims", {"metric": "acc"}, 0.5),
        ("world_hazard_cloze", {"metric": "acc_norm"}, 0.25),
        ("world_hazard_open", {"metric": "exact_match"}, None),
    ],
)
def test_chance_is_that_of_the_task(task: str, found: dict[str, Any], share: float | None) -> None:
    assert chance(task, found) == share


def test_the_page_opens_with_it(run: Path) -> None:
    found, text = report(run)
    first = text[: text.index("</figure>")]
    assert 'class="overview"' in first and first.count("<svg") == 4, "one wide, and one for each part"
    assert "<table" not in first and "<pre" not in first
    for words in ("95 % intervals", "what guessing earns", "never-seen, the control", "at any step"):
        assert words in found.text


def test_a_run_that_nobody_measured_has_no_such_picture(run: Path) -> None:
    for file in [*run.rglob("results_*.json"), run.parent / "some-attack/attack.json"]:
        file.unlink()
    found, text = report(run)
    assert 'class="overview"' not in text and "This run was not evaluated" in found.text


def comparison() -> dict[str, Any]:
    """compare.json of two methods and a control that never saw the text."""
    methods = [row(name, {"a": [point(0, 0), point(40, share)]}) for name, share in (("npo", 0.5), ("rmu", 1.0))]
    found = results(methods, [row("never-seen", {"a": [point(0, 0), point(40, 0)]}, within=None)], RULES)
    empty: dict[str, Any] = {"trials": {}, "settings": {}, "commands": {}, "digests": {}, "warnings": []}
    return found | empty | {"verdict": ["Rmu is last.", "One seed."]}


def test_a_comparison_opens_with_all_methods_and_controls() -> None:
    found = comparison()
    parts = compare_page.overview(found, RULES)
    assert [part.title for part in parts] == ["bio, never attacked: lower is better", "stem: higher is better"]
    assert [one.name for one in parts[0].rows] == [*found["ranking"], "never-seen"]
    for one in parts[0].rows:
        before, after = one.bars
        worst = found["rows"][one.name]["worst"]["never attacked"]["bio"]
        assert before.acc == 0 and after.acc == worst["acc"] and after.interval == tuple(worst["interval"])
        assert (one.control is None) == (one.name == "never-seen")
    assert [bar.acc for one in parts[1].rows for bar in one.bars] == [1.0] * 6
    text = render_comparison("compare", found, RULES)
    assert text.index("Rmu is last") < text.index('class="overview"') < text.index("One seed") < text.index("Ranked")


def captions(text: str) -> list[str]:
    """The caption of every figure; each has one."""
    figures = re.findall(r"<figure\b.*?</figure>", text, re.DOTALL)
    found = [re.findall(r"<figcaption>(.*?)</figcaption>", one, re.DOTALL) for one in figures]
    assert figures and all(len(one) == 1 for one in found)
    return [one[0] for one in found]


@pytest.mark.parametrize("what", ["run", "comparison"])
def test_every_picture_is_told_in_a_sentence(run: Path, what: str) -> None:
    text = report(run)[1] if what == "run" else render_comparison("compare", comparison(), RULES)
    for caption in captions(text):
        assert caption.endswith(".") and len(caption.split()) >= 8, caption


def test_pages_take_the_width_there_is_and_have_a_form_for_paper(run: Path) -> None:
    _, text = report(run)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    screen, _, paper = style.partition("@media print")
    for rule in re.findall(r"(?m)^\s*(?:body|table|figure|\.wide|\.pictures|\.beside)\b[^{]*\{[^}]*\}", screen):
        assert "max-width" not in rule, rule
    assert "@page { size: A4" in style and "break-inside: avoid" in style
    assert ".on-screen" in paper and "figure.overview" in paper
    kept = re.sub(r'<section class="on-screen">.*?</section>', "", text, flags=re.DOTALL)
    for heading, left in (("Accuracy", True), ("What the attack in some-attack", True), ("Commands and", False)):
        assert heading in text and (heading in kept) == left


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_prints_it_on_two_pages_and_scrolls_no_page_sideways(run: Path, tmp_path: Path) -> None:
    _, text = report(run)
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    paper = tmp_path / "page.pdf"
    subprocess.run([*words, f"--print-to-pdf={paper}", f"file://{run}/report.html"], capture_output=True, timeout=60)
    assert len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) == 2
    (tmp_path / "open.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", text))
    for width in (390, 1280, 1920):
        asking = f"document.title = frame.contentDocument.documentElement.scrollWidth <= {width}"
        frame = f'<iframe id="frame" src="open.html" style="border: 0; width: {width}px" onload="{asking}"></iframe>'
        (tmp_path / "frame.html").write_text(f"<title>not asked</title>{frame}")
        shown = [*words, "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path}/frame.html"]
        assert "<title>true</title>" in subprocess.run(shown, capture_output=True, text=True, timeout=60).stdout, width


def test_what_the_record_says_of_tasks_goes_before_their_names(run: Path) -> None:
    file = run.parent / "some-attack/attack.json"
    write(file, json.loads(file.read_text()) | {"hazard": ["cities"], "general": ["world_hazard_open"]})
    kinds = by_kind(read_record(run), STAGES["before"])
    assert kinds == {HAZARD: ["wmdp_bio", "cities"], GENERAL: ["world_hazard_open", "mmlu_stem"]}
