"""The report: what a run left behind, on one page that needs nothing else and believes nothing that it prints."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_support import question, write_wmdp
from report_support import make_run, numbers, report, result, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from unlearn.config import TrainConfig, parse_method_flags
from unlearn.errors import UserError
from unlearn.launch.report import write_report
from unlearn.launch.report.config import ReportConfig
from unlearn.launch.report.origins import command
from unlearn.launch.report.record import read_record
from unlearn.lens import TunedLens
from unlearn.lens_readings import LONGEST


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_the_numbers_are_those_of_the_files(run: Path) -> None:
    page, text = report(run)
    assert "wmdp_bio 90.0 % 80.0–100.0 of 40 37.5 % 27.5–47.5 of 40 50.0 % 40.0–60.0 of 40" in page.text
    assert "some-attack" in text and "elsewhere" not in text, "an attack on another model is none on this one"
    assert "feed" * 16 in text and "0.4.13" in text
    assert page.elements.count("figure") == 8
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
        ("evals/own/results_2.json", '{"results": {}}', "found none of their keys"),
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
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'unlearn[report]'")):
        write_report(ReportConfig(str(run)))


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-rank 16 --lora-targets query_key_value dense --clip inf",
        "--optimizer muon --remove-coef 3 --retain-coef 0 --overwrite",
        "--checkpoint-activations none --micro-tokens 4096",
        "--forget-template '{title}\n\n{text}' --layers 3 --seed 7 --eval-tasks a b --eval-every 3",
        "",
    ],
)
def test_the_command_gives_the_same_flags(flags: str) -> None:
    config = parse_method_flags(TrainConfig, shlex.split(flags))
    stored = json.loads(
        json.dumps({key: "inf" if value == float("inf") else value for key, value in vars(config).items()})
    )
    words = shlex.split(command(stored))
    assert words[:2] == ["python", "train.py"] and parse_method_flags(TrainConfig, words[2:]) == config


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
