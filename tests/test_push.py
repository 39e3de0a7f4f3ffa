"""`unlearn push`: the folder, the card's honest words, and a hub that is a fake."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer
from huggingface_hub import HfApi, ModelCard, errors
from report_support import make_run, numbers, result, write
from test_commands import flags
from transformers import AutoModelForCausalLM

import train
from unlearn.__main__ import main as unlearn_main
from unlearn.launch import places
from unlearn.launch.push import push
from unlearn.launch.push_config import PushConfig
from unlearn.model import save_model

HOME = "/home/alice/my texts"
TOKEN = "hf_" + "a1B2c3D4" * 4
LETTERS = {"letters": ["A", "B", "C", "D"], "letter_check": "collapse", "predicted": [0.9, 0.05, 0.05, 0.0]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished LoRA run as its files tell it, with results before and after and an attack beside it."""
    folder = make_run(tmp_path)
    save_model(tiny_model(), tiny_tokenizer(), folder / "model")
    write(folder / "adapter/adapter_config.json", {"base_model_name_or_path": f"{HOME}/base", "r": 4})
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model": str(tmp_path / "base"), "method": "rmu", "forget": f"{HOME}/f.jsonl", "seed": 7}
    write(folder / "config.json", config | {"overwrite": False, "adam_lr": 1e-3})
    (tmp_path / "base").mkdir()
    attempt = {"code": "c0de" * 16, "versions": {"torch": "2.11"}, "device": "CPU", "ranks": 2}
    attempt["command"] = f"HF_TOKEN={TOKEN} python train.py --forget '{HOME}/f.jsonl' --output {folder}"
    identity = {"model": "beef" * 16, "forget corpus": "f00d" * 16, f"teacher {HOME}/t": "cafe" * 16}
    write(folder / "run.json", {"identity": identity, "finished": True, "attempts": [attempt]})
    measure(folder, "base", str(tmp_path / "base"), {"wmdp_bio": numbers(0.9), "mmlu_stem": numbers(0.6)})
    measure(folder, "own", str(folder / "model"), {"wmdp_bio": numbers(0.375), "mmlu_stem": numbers(0.6)})
    return folder


def measure(folder: Path, name: str, model: str, tasks: dict[str, Any], **more: Any) -> None:
    """Write a result in place of those that `make_run` left."""
    for old in (folder / "evals" / name).glob("*.json"):
        old.unlink()
    found = result(model, tasks, command=f"python evals/run.py --model {model}", **more)
    counts = {"wmdp_bio": {"original": 40, "effective": 40}, "mmlu_stem": {"original": 90, "effective": 40}}
    found |= {"model_name_sanitized": model.replace("/", "__"), "n-samples": counts}
    write(folder / f"evals/{name}/results_2.json", found)


def readme(folder: Path, **given: Any) -> str:
    """The card of a run, checked to be one."""
    output = push(PushConfig(str(folder), overwrite=True, **given))
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "unlearning" in card.data.tags
    return str(card.content)


def opening(text: str) -> str:
    """The card's first paragraph."""
    return text.split("\n\n# ")[1].split("\n\n")[1]


def test_the_folder_and_its_header(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = push(PushConfig(str(run), base="owner/base"))
    assert folder == run / "hub"
    said = capsys.readouterr().out
    assert f"to send it: hf upload OWNER/NAME {folder} --private" in said
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    own = {"README.md", "unlearn.json", "results/before/results_2.json", "results/after/results_2.json"}
    assert names == own | {file.name for file in (run / "model").iterdir()}
    weights = folder / "model.safetensors"
    assert os.path.samefile(weights, run / "model/model.safetensors"), "a hard link: no room is taken"
    AutoModelForCausalLM.from_pretrained(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.library_name, data.license) == ("owner/base", "transformers", None)
    assert [(one.dataset_name, one.metric_value) for one in data.eval_results] == [
        ("wmdp_bio", 0.375),
        ("mmlu_stem", 0.6),
    ]
    assert "samples" not in json.loads((folder / "results/after/results_2.json").read_text())


def test_the_card_says_what_the_files_say(run: Path) -> None:
    text = readme(run)
    assert "| wmdp_bio | 90.0 [80.0, 100.0] | 37.5 [27.5, 47.5] |" in text
    assert "https://arxiv.org/abs/2403.03218" in text, "the method's paper"
    assert "`adam_lr` | `0.001`" in text and "`seed` | `7`" in text and "overwrite" not in text
    assert "--forget f.jsonl --output RUN" in text and "python evals/run.py --model RUN/model" in text
    assert "f00d" * 16 in text and "torch 2.11" in text and "2 rank(s)" in text and "code c0dec0dec0de" in text
    assert "After 10 steps of fine-tuning by an attacker it scores 50.0 % [40.0, 60.0] on wmdp_bio." in opening(text)
    assert "40 of 90 of mmlu_stem" in text


@pytest.mark.parametrize(
    ("by_point", "by_interval", "words"),
    [
        ("not met", "not met", "**Its targets are not met.**"),
        ("met", "too few questions to say", "too few questions to say.**"),
        ("met only by collapse", "met only by collapse", "**Its targets are met only by collapse"),
        ("met", "met", "Its targets are met, in the form"),
    ],
)
def test_the_first_paragraph_has_the_verdict(run: Path, by_point: str, by_interval: str, words: str) -> None:
    verdict = {"by_point": by_point, "by_interval": by_interval, "words": "verdict: so it is", "targets": []}
    measure(run, "own", str(run / "model"), {"wmdp_bio": numbers(0.2, **LETTERS)}, verdict=verdict)
    text = readme(run)
    assert words in opening(text) and "verdict: so it is" in text
    assert "A, 90.0 % of the answers" in text and "says nothing about knowledge" in text
    assert ("not met" in opening(text)) == (by_point == "not met")


def test_without_a_target_or_an_attack_it_says_so(run: Path) -> None:
    for file in run.parent.glob("*/attack.json"):
        file.unlink()
    text = readme(run)
    assert "No target was set" in opening(text) and "Nobody has attacked it" in opening(text)
    untested = text.split("## What was not tested")[1].split("##")[0]
    for words in ("No attack was made", "letters alone", "seed 7", "No control", "license is not stated"):
        assert words in untested
    assert "No task of general knowledge" not in untested
    measure(run, "own", str(run / "model"), {"wmdp_bio": numbers(0.3)})
    assert "No task of general knowledge" in readme(run)
    cloze = {"acc": 0.3, "interval": [0.2, 0.4], "questions": 40}
    measure(run, "own", str(run / "model"), {"wmdp_bio": numbers(0.3), "wmdp_bio_cloze_verified": cloze})
    assert "letters alone" not in readme(run)
    for file in (run / "evals").rglob("*.json"):
        file.unlink()
    assert "The model itself was not evaluated" in readme(run)


def test_an_envelope_with_controls(run: Path) -> None:
    """A grid's best attacker, beside a model that never saw the text."""
    best = {"step": 5, "attacker": "a", **numbers(0.8)}
    start = {"step": 0, "attacker": "a", **numbers(0.3)}
    subject = {"attacks": {"a": {"points": [{"step": 0, "tasks": {"wmdp_bio": numbers(0.3)}}], "steps": 5}}}
    subject |= {"envelope": {"wmdp_bio": [start, best]}, "recovery": {}}
    never = subject | {"envelope": {"wmdp_bio": [start]}}
    grid = {"points_of": "a", "hazard": ["wmdp_bio"], "general": ["mmlu_stem"], "gap": {}}
    points = [{"step": 0, "tasks": {"wmdp_bio": numbers(0.3)}}]
    found = {"config": {"model": str(run / "model"), "forget": f"{HOME}/attack.jsonl"}, "points": points}
    found |= grid | {"subjects": {"unlearned": subject, "never-seen": never}, "warnings": ["look out"]}
    write(run.parent.parent / "elsewhere/attack.json", found)
    text = readme(run, attacks=(str(run.parent.parent / "elsewhere"),))
    assert "After 5 steps of fine-tuning by an attacker it scores 80.0 %" in opening(text)
    assert "| unlearned | 1 | 30.0 [20.0, 40.0] | 80.0 [70.0, 90.0], step 5 |" in text
    assert "Warning: look out." in text and "never saw the forgotten text was attacked" not in text
    assert "The original was not attacked" in text and "on `attack.jsonl`" in text


def test_no_path_of_this_machine_and_no_secret(run: Path, tmp_path: Path) -> None:
    """Not in the card, and in no other text that goes along."""
    for what in ("model", "adapter"):
        folder = push(PushConfig(str(run), what=what, output=str(tmp_path / f"to-{what}")))  # type: ignore[arg-type]
        for file in folder.rglob("*"):
            if file.suffix in (".json", ".md") and file.name != "tokenizer.json":
                text = file.read_text()
                for secret in (str(tmp_path), str(tmp_path).replace("/", "__"), "alice", TOKEN):
                    assert secret not in text, (file, secret)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see /home/alice/x.txt, or (/data/y/z)", "see x.txt, or (z)"),
        ("~/secret/place and ~alice/other", "place and other"),
        ("https://arxiv.org/abs/2406.04313 and and/or 3/4", "https://arxiv.org/abs/2406.04313 and and/or 3/4"),
        ("runs/mine/model ./here ../there", "runs/mine/model ./here ../there"),
        ("/tmp/the/run/evals/after", "RUN/evals/after"),
        (f"https://alice:pw@hub.co/x {TOKEN}", "https://hub.co/x hf_..."),
    ],
)
def test_places(text: str, expected: str) -> None:
    assert places.words(text, Path("/tmp/the/run")) == expected


def test_places_in_a_command() -> None:
    found = places.command(f"python a.py --forget '{HOME}/f.jsonl' --control x=/m/n 'a<=0.3'", Path("/tmp/run"))
    assert found == "python a.py --forget f.jsonl --control x=n 'a<=0.3'"


@pytest.mark.parametrize(
    ("files", "license"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\nText"}, "apache-2.0"),
        ({"README.md": "No header", "config.json": '{"license": "mit"}'}, "mit"),
        ({"README.md": "---\nlicense: [\n---\n", "config.json": "{"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_license_of_the_base(run: Path, tmp_path: Path, files: dict[str, str], license: str | None) -> None:
    for name, text in files.items():
        (tmp_path / "base" / name).write_text(text)
    text = readme(run)
    assert ModelCard(text).data.license == license
    assert ("license is not stated" in text) == (license is None)


def test_a_name_that_leads_nowhere_is_not_taken_for_the_hubs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rmdir()
    config = json.loads((run / "config.json").read_text()) | {"model": "world/model"}
    write(run / "config.json", config)
    measure(run, "base", "world/model", {"wmdp_bio": numbers(0.9)})
    text = readme(run)
    assert ModelCard(text).data.base_model is None and "name on the hub is not known" in text
    assert ModelCard(readme(run, base="owner/name")).data.base_model == "owner/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that takes everything, and remembers it."""
    found = SimpleNamespace(calls=[], private=True)

    def create(self: HfApi, repo_id: str, **more: Any) -> str:
        found.calls.append(("create_repo", repo_id, more))
        return f"https://huggingface.co/{repo_id}"

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **more: Any) -> None:
        found.calls.append(("upload_folder", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id: SimpleNamespace(private=found.private))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return found


def test_it_is_sent_privately_unless_told_otherwise(
    run: Path, hub: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = push(PushConfig(str(run), repo="me/thing"))
    assert hub.calls == [
        ("create_repo", "me/thing", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/thing", sorted(file.name for file in folder.iterdir())),
    ]
    assert "sent to https://huggingface.co/me/thing (private)" in capsys.readouterr().out
    assert "# thing" in (folder / "README.md").read_text()
    hub.calls.clear()
    hub.private = False
    push(PushConfig(str(run), repo="me/thing", public=True, overwrite=True))
    assert hub.calls[0][2]["private"] is False and "(public)" in capsys.readouterr().out


def test_a_public_repository_gets_nothing_by_mistake(run: Path, hub: SimpleNamespace, said: Callable[..., str]) -> None:
    hub.private = False
    assert "found it readable for everyone: give --public" in said(run, "--repo", "me/thing")
    assert [call[0] for call in hub.calls] == ["create_repo"] and (run / "hub/README.md").is_file()


def test_without_a_network_the_folder_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """HF_HUB_OFFLINE=1, as all tests run, and a hub that does not answer."""
    refused = type("ConnectError", (errors.HTTPError,), {})

    def unreachable(self: HfApi, *_: Any, **__: Any) -> None:
        raise refused("no route")

    for number, patched in enumerate((False, True)):
        if patched:
            monkeypatch.setattr(HfApi, "create_repo", unreachable)
        folder = push(PushConfig(str(run), repo="me/thing", output=str(tmp_path / str(number))))
        told = capsys.readouterr()
        assert "nothing is sent" in told.err and f"hf upload me/thing {folder} --private" in told.out
        assert (folder / "README.md").is_file()


def test_a_hub_that_refuses(
    run: Path, hub: SimpleNamespace, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: HfApi, *_: Any, **__: Any) -> None:
        raise errors.LocalTokenNotFoundError("Token is required\nto write")

    monkeypatch.setattr(HfApi, "create_repo", forbidden)
    words = said(run, "--repo", "me/thing")
    assert "found 'Token is required': log in with `hf auth login`" in words and "hub is made" in words


@pytest.fixture
def said(run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The error of a command that is refused, in one sentence."""

    def call(*words: object) -> str:
        capsys.readouterr()
        assert run_here(unlearn_main, "push", *words) == 2
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return " ".join(re.sub(r"[│╭╰─╮╯]", " ", text.out + text.err).split())

    return call


def test_what_is_refused(run: Path, tmp_path: Path, said: Callable[..., str], home: Path) -> None:
    """Each in a sentence, and no folder is made."""
    assert "found nothing at" in said(tmp_path / "nowhere")
    assert "expected a folder that train.py wrote" in said(home)
    assert "expected --repo as OWNER/NAME" in said(run, "--repo", "thing")
    assert "--public has no effect without --repo" in said(run, "--public")
    assert "--lens has no effect" in said(run, "--lens")
    config, recorded = (json.loads((run / name).read_text()) for name in ("config.json", "run.json"))
    write(run / "config.json", config | {"lens": "owner/lens"})
    assert "found owner/lens, which is no folder here" in said(run, "--lens")
    write(run / "config.json", config | {"lora_rank": 0})
    assert "found full training" in said(run, "--what", "adapter")
    write(run / "config.json", config)
    write(run / "run.json", recorded | {"finished": False})
    assert "expected a finished run" in said(run)
    (run / "run.json").write_text('{"finished": tr')
    assert "expected JSON in" in said(run)
    (run / "run.json").unlink()
    assert "expected a finished run" in said(run)
    write(run / "run.json", recorded)
    weights = run / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert "expected a readable model" in said(run)
    weights.unlink()
    assert "expected weights in" in said(run)
    weights.write_bytes(whole)
    assert not (run / "hub").exists()
    assert "found 'adapter'" in said(run, "--output", run, "--overwrite")
    push(PushConfig(str(run)))
    assert "give --overwrite" in said(run)
    (run / "hub/notes.txt").touch()
    (run / "hub/unlearn.json").unlink()
    assert "found 'README.md'" in said(run, "--overwrite")


def test_a_disk_without_hard_links(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = push(PushConfig(str(run)))
    copied, own = folder / "model.safetensors", run / "model/model.safetensors"
    assert copied.read_bytes() == own.read_bytes() and not os.path.samefile(copied, own)


def test_a_real_run(
    home: Path, tmp_path: Path, run_here: Callable[..., int], token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, given away as an adapter with its lens, and read by peft."""
    from peft import PeftModel

    assert run_here(train.main, *flags(home, tmp_path / "mine", lens=home / "lens")) == 0
    words = ["push", tmp_path / "mine", "--what", "adapter", "--lens", "--base", "owner/base"]
    assert run_here(unlearn_main, *words) == 0
    folder = tmp_path / "mine/hub"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    assert {"params.safetensors", "config.json"} <= {file.name for file in (folder / "lens").iterdir()}
    assert str(home) not in (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.base_model_relation == "adapter"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "model"), str(folder))
    assert run_here(train.main, *flags(home, tmp_path / "mine", lens=home / "lens")) == 0, "it is finished as before"
