"""Prepare the folder for `--data-dir`: fetch question files from the hub, then check them without it.

    python evals/fetch.py --data-dir questions                  where there is network
    python evals/fetch.py --data-dir questions --check          where there is none, after copying the folder

The check reads every question as an evaluation does, compares the numbers of questions with the published ones, and the
SHA-256 of each file with those noted in DIR/fetched.json when it was fetched.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlearn.config import parse_flags
from unlearn.errors import UserError
from unlearn.evals.fetch_config import FetchConfig

NOTES = "fetched.json"
# Questions of the published data sets: a mirror or a selection with other numbers gives other accuracies.
PUBLISHED = {
    "wmdp_bio": 1273,
    "wmdp_chem": 408,
    "wmdp_cyber": 1987,
    "mmlu": 14042,
    "mmlu_stem": 3153,
    "wmdp_bio_robust": 868,
    "wmdp_bio_shortcut": 405,
    "wmdp_bio_cloze_verified": 1076,
}


def main() -> None:
    fetch(parse_flags(FetchConfig))


def fetch(config: FetchConfig) -> None:
    """Fetch unless only a check was asked for, then check and print.

    Raises:
        UserError: the hub cannot be reached, a file is missing, damaged or changed, or questions are missing.
    """
    if not config.check:
        download(config)
    print(check(config))


def download(config: FetchConfig) -> None:
    """Fetch the Parquet files of every split that the tasks take questions or few-shot examples from."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from unlearn.evals.harness.task_loader import question_sources
    from unlearn.files import write_json, writing

    with writing(config.data_dir):
        config.data_dir.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, list[str]] = {}
    for path, name, split in question_sources(config.tasks, config.include_path):
        folder = f"{name}/" if name else ""
        wanted.setdefault(path, []).extend([f"{folder}{split}-*.parquet", f"{folder}data/{split}-*.parquet"])
    for path, patterns in wanted.items():
        print(f"fetching {path}", flush=True)
        try:
            with writing(config.data_dir):
                snapshot_download(
                    path, repo_type="dataset", local_dir=config.data_dir / path, allow_patterns=sorted(set(patterns))
                )
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise UserError(
                f"expected access to the data set {path} on the Hugging Face hub; found {type(error).__name__}: open "
                f"https://huggingface.co/datasets/{path}, accept its terms, and log in with `hf auth login`"
            ) from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"expected the data set {path} from the Hugging Face hub; found {reason!r}: run this where there is "
                "network, copy the folder, and check it with --check"
            ) from error
    write_json(config.data_dir / NOTES, _noted(config.data_dir) | _digests(config))


def check(config: FetchConfig) -> str:
    """Read every question as an evaluation does, without network.

    Returns:
        a line for each of the tasks: questions and files.
    """
    noted, found = _noted(config.data_dir), _digests(config)
    for file, digest in found.items():
        if noted.get(file, digest) != digest:
            raise UserError(
                f"expected {config.data_dir / file} as it was fetched (SHA-256 {noted[file][:12]}...); found "
                f"{digest[:12]}...: fetch it again"
            )
    lines = []
    for name, questions, files in _counts(config):
        published = PUBLISHED.get(name)
        if published is not None and questions != published:
            raise UserError(
                f"expected the {published:,} published questions of {name} in {config.data_dir}; found {questions:,}: "
                "accuracies would not be comparable, fetch the data set again"
            )
        lines.append(f"{name}: {questions:,} questions in {files} files")
    return "\n".join([*lines, f"{config.data_dir} is ready for --data-dir"])


def _noted(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file when it was fetched; empty for a folder made otherwise."""
    file = folder / NOTES
    if not file.is_file():
        return {}
    try:
        notes: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"expected JSON in {file}; found {str(error)!r}: delete it and fetch again") from error
    return notes


def _digests(config: FetchConfig) -> dict[str, str]:
    """The SHA-256 of each file with questions, or with examples that --num-fewshot may ask for."""
    from unlearn.evals.harness.local_data import LocalData
    from unlearn.evals.harness.task_loader import question_sources

    found = {file: digest for task in _load(config).values() for file, digest in task.provenance.items()}
    local = LocalData(config.data_dir)
    for source in question_sources(config.tasks, config.include_path):
        if not any(str(file.relative_to(local.root)) in found for file in local.files(*source)):
            found |= local.read(*source)[1]
    return found


def _counts(config: FetchConfig) -> Iterable[tuple[str, int, int]]:
    """(name, questions, files) of each of the tasks asked for."""
    for name in dict.fromkeys(config.tasks):
        tasks = _load(config, (name,)).values()
        files = {file for task in tasks for file in task.provenance}
        yield name, sum(task.available for task in tasks), len(files)


def _load(config: FetchConfig, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    from unlearn.evals.harness.task_loader import load_tasks

    loaded = load_tasks(names or config.tasks, data_dir=config.data_dir, include_path=config.include_path)
    tasks: dict[str, Any] = loaded["tasks"]
    return tasks
