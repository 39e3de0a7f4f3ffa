"""`python evals/fetch.py`: what is fetched, what is checked; the hub itself is replaced by a folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from evals_support import question, write_questions, write_stem, write_wmdp

from unlearn.evals import fetch as command
from unlearn.evals.harness.task_loader import load_tasks, question_sources


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """A hub in `tmp_path/hub`; what was asked of it."""
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, repo_type: str, local_dir: Path, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        asked.append((name, allow_patterns))
        root = tmp_path / "hub" / name
        for pattern in allow_patterns:
            for file in root.glob(pattern):
                target = local_dir / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(command, "PUBLISHED", {"wmdp_bio": 8, "mmlu_stem": 56})
    write_wmdp(tmp_path / "hub", [question(i, i % 4, None) for i in range(8)])
    for subject in write_stem(tmp_path / "hub"):
        write_questions(tmp_path / "hub/cais/mmlu" / subject, [question(i, i, None) for i in range(2)], "dev")
        write_questions(tmp_path / "hub/cais/mmlu" / subject, [question(0, 0, None)], "validation")
    cloze = [{"question": "Which?", "choices": ["it", "over"], "answer": 0}]
    write_questions(tmp_path / "hub/EleutherAI/wmdp_bio_cloze/data", cloze, "cloze_compatible")
    write_questions(tmp_path / "hub/EleutherAI/wmdp_bio_cloze/data", cloze, "mcqa_only")
    return asked


def test_fetches_question_splits_only_and_checks_them_offline(
    tmp_path: Path,
    hub: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    run_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "questions"
    tasks = ["--tasks", "wmdp_bio", "mmlu_stem", "wmdp_bio_cloze_verified"]
    assert run_here(command.main, "--data-dir", folder, *tasks) == 0
    printed = capsys.readouterr().out
    assert "wmdp_bio: 8 questions in 1 files" in printed and "mmlu_stem: 56 questions in 19 files" in printed
    assert [name for name, _ in hub] == ["cais/wmdp", "cais/mmlu", "EleutherAI/wmdp_bio_cloze"]
    assert not [*folder.rglob("mcqa_only*"), *folder.rglob("validation*")], "no other splits"
    moved = tmp_path / "moved"
    folder.rename(moved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert run_here(command.main, "--data-dir", moved, "--check", *tasks) == 0
    assert "is ready for --data-dir" in capsys.readouterr().out


def test_few_shot_examples_are_fetched_and_checked(
    tmp_path: Path, hub: list[Any], run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """--num-fewshot with the folder that was fetched for it ended in: no such file."""
    folder = tmp_path / "questions"
    flags = ["--data-dir", folder, "--tasks", "mmlu_anatomy"]
    assert run_here(command.main, *flags) == 0
    task = load_tasks(["mmlu_anatomy"], data_dir=folder, shots=1)["tasks"]["mmlu_anatomy"]
    assert len(task.provenance) == 2
    examples = folder / "cais/mmlu/anatomy/dev-00000-of-00001.parquet"
    write_questions(examples.parent, [question(5, 1, None)], "dev")
    assert run_here(command.main, *flags, "--check") == 2
    assert f"expected {examples} as it was fetched" in capsys.readouterr().err
    examples.unlink()
    assert run_here(command.main, *flags, "--check") == 2
    assert "dev-*.parquet; found no such file" in capsys.readouterr().err


def test_changed_and_missing_questions_are_found(
    tmp_path: Path, hub: list[Any], run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "questions"
    assert run_here(command.main, "--data-dir", folder, "--tasks", "wmdp_bio") == 0
    check = ["--data-dir", folder, "--check", "--tasks"]
    capsys.readouterr()
    assert run_here(command.main, *check, "mmlu_stem") == 2
    assert "found no such file" in capsys.readouterr().err
    write_wmdp(folder, [question(i, (i + 1) % 4, None) for i in range(8)])
    assert run_here(command.main, *check, "wmdp_bio") == 2
    assert "as it was fetched (SHA-256" in capsys.readouterr().err
    (folder / "fetched.json").unlink()
    write_wmdp(folder, [question(i, i % 4, None) for i in range(7)])
    assert run_here(command.main, *check, "wmdp_bio") == 2
    assert "expected the 8 published questions of wmdp_bio" in capsys.readouterr().err
    (folder / "fetched.json").write_text("{")
    assert run_here(command.main, *check, "wmdp_bio") == 2
    assert "expected JSON in" in capsys.readouterr().err


def test_hub_out_of_reach_is_one_sentence(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The genuine client, offline as all tests are."""
    assert run_here(command.main, "--data-dir", tmp_path, "--tasks", "wmdp_bio") == 2
    error = capsys.readouterr().err
    assert "expected the data set cais/wmdp from the Hugging Face hub" in error and "--check" in error
    assert error.count("\n") == 1


def test_sources_are_those_of_the_tasks() -> None:
    assert question_sources(["wmdp"]) == [("cais/wmdp", f"wmdp-{kind}", "test") for kind in ("bio", "chem", "cyber")]
    robust = question_sources(["wmdp_bio_robust"])
    assert len(robust) == 6 and {(path, split) for path, _, split in robust} == {
        ("EleutherAI/wmdp_bio_robust_mcqa", "robust")
    }
    assert question_sources(["wmdp_bio_cloze_verified"]) == [("EleutherAI/wmdp_bio_cloze", None, "cloze_compatible")]
    mmlu = question_sources(["mmlu"])
    assert [sum(split == wanted for _, _, split in mmlu) for wanted in ("test", "dev")] == [57, 57] and len(mmlu) == 114
