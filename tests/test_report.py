"""The report: what a run left behind, on one page that needs nothing else and believes nothing that it prints."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_support import question, write_wmdp
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
import unlearn.report
from unlearn.config import TrainConfig, parse_flags
from unlearn.errors import UserError
from unlearn.lens import TunedLens
from unlearn.lens_readings import LONGEST
from unlearn.report import write_report
from unlearn.report.origins import command
from unlearn.report.record import read_record
from unlearn.report_config import ReportConfig

VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order, no id occurs twice."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        self.ids = set(ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_alone(page: Page, text: str) -> None:
    """Nothing on the page is fetched, nothing runs, and what it refers to is on it."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.elements)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "srcset", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,"))
            assert not value.startswith("#") or value[1:] in page.ids
    style = " ".join(re.findall(r"<style>.*?</style>", text, re.DOTALL))
    assert "@import" not in style and "url(" not in style
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= page.ids


def numbers(acc: float, **more: Any) -> dict[str, Any]:
    base = {"acc": acc, "interval": [acc - 0.1, acc + 0.1], "questions": 40, "predicted": [0.3, 0.3, 0.2, 0.2]}
    return base | {"debiased": acc, "debiased_interval": [acc - 0.1, acc + 0.1]} | more


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def result(model: str, tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {"summary": tasks, "data": {"wmdp_bio": {"sha256": "feed" * 16}}} | more
    return {"model_name": model, "unlearn": own, "lm_eval_version": "0.4.13", "group_subtasks": {}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run as its files tell it, with a result before and after, and an attack."""
    folder = tmp_path / "run"
    config = {"model": "base/model", "forget": "f.jsonl", "retain": "r.jsonl", "layers": [1, 2], "lora_rank": 4}
    write(folder / "config.json", config)
    lines = [
        {
            "step": step,
            "loss": 3.0 - step,
            "forget_loss": 2.0,
            "retain_loss": 0.1,
            "gradient_norm": 0.5,
            "adamw_lr": 0.1,
        }
        | {"entropy/1": 1.0, "entropy/2": 2.0}
        for step in range(3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "model").mkdir()
    write(folder / "evals/base/results_1.json", result("base/model", {"wmdp_bio": numbers(0.9)}))
    write(folder / "evals/own/results_2.json", result(str(folder / "model"), {"wmdp_bio": numbers(0.375)}))
    points = [{"step": step, "tasks": {"wmdp_bio": numbers(0.4 + step / 100)}} for step in (0, 10)]
    write(tmp_path / "some-attack/attack.json", {"config": {"model": str(folder / "model")}, "points": points})
    write(tmp_path / "other/attack.json", {"config": {"model": "elsewhere/model"}, "points": points})
    return folder


def report(folder: Path, **flags: Any) -> tuple[Page, str]:
    text = write_report(ReportConfig(str(folder), **flags)).read_text()
    page = Page(text)
    check_alone(page, text)
    return page, text


def test_the_numbers_are_those_of_the_files(run: Path) -> None:
    page, text = report(run)
    assert "wmdp_bio 90.0 % 80.0–100.0 of 40 37.5 % 27.5–47.5 of 40 50.0 % 40.0–60.0 of 40" in page.text
    assert "some-attack" in text and "elsewhere" not in text, "an attack on another model is none on this one"
    assert "feed" * 16 in text and "0.4.13" in text
    assert page.elements.count("svg") == 8
    assert "No verdict" in page.text


def test_the_verdict_comes_first(run: Path) -> None:
    verdict = {"by_point": "met", "by_interval": "too few questions to say", "words": "wmdp_bio<=0.4: met"}
    write(run / "evals/own/results_2.json", result(str(run / "model"), {"wmdp_bio": numbers(0.375)}, verdict=verdict))
    page, _ = report(run)
    assert "No verdict" not in page.text
    for words in ("met by point estimate", "too few questions to say by 95 % interval", "wmdp_bio<=0.4: met"):
        assert page.text.index(words) < page.text.index("37.5 %")


def test_a_habit_of_one_letter_is_said_at_the_top(run: Path) -> None:
    biased = numbers(0.25, predicted=[0.02, 0.9, 0.04, 0.04])
    write(run / "evals/own/results_2.json", result(str(run / "model"), {"wmdp_bio": biased}))
    page, _ = report(run)
    assert page.text.index("90.0 % of the answers are the same choice") < page.text.index("25.0 %")


def test_subjects_of_a_group_stand_apart(run: Path) -> None:
    tasks = {"wmdp_bio": numbers(0.3), "mmlu_stem": numbers(0.6), "mmlu_anatomy": numbers(0.5)}
    groups = {"group_subtasks": {"mmlu_stem": ["mmlu_anatomy"], "wmdp_bio": []}}
    write(run / "evals/own/results_2.json", result(str(run / "model"), tasks) | groups)
    page, _ = report(run)
    assert page.text.index("60.0 %") < page.text.index("The subjects") < page.text.index("mmlu_anatomy")
    assert not [words for words in page.words if "mmlu_anatomy:" in words], "no picture for each subject"


def test_everything_is_escaped(run: Path) -> None:
    """A model, a corpus, a task, a token or a verdict may be called anything."""
    evil = "<script>alert(1)</script>\"'><img src=http://x.example/y onerror=z>\x07\x1b$x_1$&amp;{{ 7*7 }}\u202e"
    name = evil.replace("/", "")
    config = json.loads((run / "config.json").read_text())
    write(run / "config.json", config | {"model": evil, "forget": evil, evil: [evil, {evil: evil}]})
    task = {name: numbers(0.4, letters=[evil] * 4), f"{name}/{evil}": numbers(0.2)}
    more = {"verdict": {"by_point": evil, "by_interval": evil, "words": evil}, "data": {evil: {evil: evil}}}
    write(run / "evals/base/results_1.json", result(evil, task, **more))
    write(run / "evals/own/results_2.json", result(str(run / "model"), task, **more))
    points = [{"step": 0, "tasks": task}, {"step": 9, "tasks": task}]
    attack = {"config": {"model": str(run / "model"), evil: evil}, "points": points, "warnings": [evil]}
    write(run.parent / "some-attack/attack.json", attack)
    evil += "\x00"
    row = {"layer": 0, "tokens": [evil], "probability": [0.5], "entropy": [1.0]}
    prompt = {"tokens": [evil], "total_tokens": 1, "before": [row], "after": [row]}
    write(run / "lens.json", {"model": evil, "lens": evil, "uniform_entropy": 5.0, "prompts": [prompt]})
    page, text = report(run)
    assert "img" not in page.elements and "<script" not in text
    assert "\x00" not in text and "\x1b" not in text and "\u202e" not in text
    assert "text" in page.elements and page.text.count("<script>alert(1)<script") > 3, "in pictures too"
    assert page.text.count("<script>alert(1)</script>") > 10 and "{{ 7*7 }}" in page.text and "&amp;{{" in page.text


def test_a_run_without_evaluations_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in [*run.rglob("results_*.json"), run.parent / "some-attack/attack.json"]:
        file.unlink()
    (run / "model").rmdir()
    page, _ = report(run)
    assert "This run was not evaluated" in page.text and "has not come to its end: 3 steps" in page.text
    (line,) = capsys.readouterr().err.splitlines()
    assert "was not evaluated: run evals/run.py" in line


def test_an_evaluation_that_failed_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page, _ = report(run, evals=(str(tmp_path / "empty"),))
    assert "holds no results" in page.text and "90.0 %" in page.text


def test_a_killed_run_can_be_reported(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    assert len(read_record(run).steps) == 3


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("config.json", "{", "expected JSON in"),
        ("config.json", '{"steps": 3}', "expected a folder that train.py wrote"),
        ("config.json", None, "expected a folder that train.py wrote"),
        ("metrics.jsonl", "{}\nnonsense\n{}\n", "found none on line 2"),
        ("evals/step-000002.json", "[]", "expected an object"),
        ("evals/step-000002.json", "{}", "expected accuracies"),
        ("evals/step-two.json", "{}", "expected evaluations named step-NUMBER.json"),
        ("evals/own/results_2.json", '{"results": {}}', "found those of another program"),
        (
            "evals/own/results_3.json",
            json.dumps(result("other/thing", {"a": numbers(0.5)})),
            "found those of other/thing",
        ),
        ("../some-attack/attack.json", '{"config": {}, "points": []}', "expected the points of an attack"),
    ],
)
def test_a_mistake_is_one_sentence(run: Path, file: str, content: str | None, found: str) -> None:
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(found)) as error:
        write_report(ReportConfig(str(run)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"evals": ("nowhere",)}, "check --evals"),
        ({"attacks": ("nowhere",)}, "found no attack.json in nowhere"),
        ({"attacks": ("../other",)}, "expected an attack on"),
        ({"prompts": ("",)}, "expected text"),
        ({"prompts": ("a",)}, "has no effect on"),
    ],
)
def test_a_wrong_flag_is_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch, flags: Any, found: str) -> None:
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match=re.escape(found)):
        write_report(ReportConfig(str(run), **flags))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing at"):
        write_report(ReportConfig(str(tmp_path / "nowhere")))


def test_without_matplotlib_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlearn.report.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'unlearn[report]'")):
        write_report(ReportConfig(str(run)))


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-rank 16 --lora-targets query_key_value dense --clip inf",
        "--optimizer muon --remove-coef 3 --retain-coef 0 --overwrite",
        "--no-checkpoint-activations --micro-tokens 4096",
        "--forget-template '{title}\n\n{text}' --layers 3 --seed 7 --eval-tasks a b --eval-every 3",
        "",
    ],
)
def test_the_command_gives_the_same_flags(flags: str) -> None:
    config = parse_flags(TrainConfig, shlex.split(flags))
    stored = json.loads(
        json.dumps({key: "inf" if value == float("inf") else value for key, value in vars(config).items()})
    )
    words = shlex.split(command(stored))
    assert words[:2] == ["python", "train.py"] and parse_flags(TrainConfig, words[2:]) == config


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run on the tiny model, evaluated before, during and after."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "real"
    write_wmdp(data, [question(index, answer=index % 4, said=None) for index in range(12)])
    words = (
        f"train.py --model {home}/model --lens {home}/lens --forget {home}/forget.jsonl --retain {home}/retain.jsonl "
        f"--output {folder} --layers 1 3 --seq-len 24 --batch 6 --micro-batch 3 --examples 15 --dtype fp32 "
        f"--lora-rank 2 --adam-lr 0.1 --eval-tasks wmdp_bio --eval-every 2 --data-dir {data}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words.split())
        train.main()
    return folder


def test_a_real_run(trained: Path) -> None:
    page, _ = report(trained, prompts=("amber basalt cobalt dolomite ember flint garnet halite iron jasper " * 5,))
    for step in (0, 3):
        measured = json.loads((trained / f"evals/step-{step:06d}.json").read_text())["wmdp_bio"]
        assert f"{100 * measured['acc']:.1f} %" in page.text
    assert f"(the first {LONGEST} of" in page.text and "Accuracy during unlearning" in page.text
    assert {"before", "after"} <= set(page.words)


def test_training_reads_the_prompts_without_changing_a_bit(
    home: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.py --prompts against the report's own reading of the two models, and against a run without them."""
    config = json.loads((trained / "config.json").read_text()) | {"output": str(tmp_path / "run"), "eval_every": None}
    prompts = ["amber basalt cobalt", "flint " * 40]
    words = [*shlex.split(command(config | {"prompts": prompts}))[1:]]
    monkeypatch.setattr(sys, "argv", words)
    train.main()
    live = json.loads((tmp_path / "run/lens.json").read_text())
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()
    page, _ = report(tmp_path / "run")
    assert f"(the first {LONGEST} of" in page.text and "amber basalt cobalt" in page.text
    write_report(ReportConfig(str(tmp_path / "run"), prompts=tuple(prompts)))
    loaded = json.loads((tmp_path / "run/lens.json").read_text())
    assert [one["tokens"] for one in live["prompts"]] == [one["tokens"] for one in loaded["prompts"]]
    for one, other in zip(live["prompts"], loaded["prompts"], strict=True):
        assert one["before"] != one["after"]
        for stage in ("before", "after"):
            for row, again in zip(one[stage], other[stage], strict=True):
                assert (row["layer"], row["tokens"]) == (again["layer"], again["tokens"])
                assert row["entropy"] == pytest.approx(again["entropy"], rel=1e-5)
                assert row["probability"] == pytest.approx(again["probability"], rel=1e-4)


def test_lens_readings_are_the_models_own(home: Path, trained: Path) -> None:
    """Against plain transformers: hidden states, the lens's formula, and the model's own logits at the end."""
    prompt = "amber basalt cobalt dolomite"
    write_report(ReportConfig(str(trained), prompts=(prompt,)))
    (found,) = json.loads((trained / "lens.json").read_text())["prompts"]
    tokens = AutoTokenizer.from_pretrained(home / "model")(prompt, return_tensors="pt")["input_ids"]
    for stage, path in (("before", home / "model"), ("after", trained / "model")):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        lens = TunedLens.load(str(home / "lens"), AutoModelForCausalLM.from_pretrained(home / "model"))
        with torch.no_grad():
            output = model(tokens, output_hidden_states=True)
            h = output.hidden_states[2][0]
            translator = lens.translators["2"]
            moved = h + h @ translator.weight.T + translator.bias
            reads = lens.norm(moved) @ lens.unembedding.T
        for layer, logits in ((2, reads), (4, output.logits[0])):
            row = found[stage][layer]
            probability, best = logits.double().softmax(-1).max(-1)
            entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
            assert row["layer"] == layer
            assert row["tokens"] == [AutoTokenizer.from_pretrained(home / "model").decode([i]) for i in best.tolist()]
            torch.testing.assert_close(torch.tensor(row["probability"]).double(), probability, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.tensor(row["entropy"]).double(), entropy, rtol=1e-4, atol=1e-4)
    assert found["before"] != found["after"]


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
    assert page.elements.count("svg") > 8 and "Each trial by its number" in page.text


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
        "original 1 attack 90.0 % 80.0–100.0 90.0 % 80.0–100.0 0 0 steps, 0 tokens –",
        "random 1 attack 25.0 % 15.0–35.0 none keeps general accuracy – – –",
    ):
        assert row in page.text
    assert {"unlearned, best of 2", "original, best of 1"} <= set(page.words) and "random, best of 1" not in page.words
    assert "of its 2 the strongest, a" in page.text and page.elements.count("svg") == 10


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


def test_commands_and_digests_come_from_the_run_itself(run: Path) -> None:
    facts = {"command": "torchrun --nproc_per_node 2 train.py --x", "code": "c0de", "versions": {"torch": "9.9"}}
    write(run / "run.json", {"identity": {"forget corpus": "beef" * 16}, "attempts": [facts | {"ranks": 2}]})
    evaluated = result(str(run / "model"), {"wmdp_bio": numbers(0.375)}, command="python evals/run.py --y")
    write(run / "evals/own/results_2.json", evaluated)
    page, _ = report(run)
    for words in ("torchrun --nproc_per_node 2 train.py --x", "python evals/run.py --y", "beef" * 16, "c0de", "9.9"):
        assert words in page.text
    assert "python evals/tamper.py --model" in page.text, "an attack without run.json is told by its flags"
