"""Results on disk, in lm-eval's own layout, so that its readers' tools find them:
`OUT/<model, / as __>/results_<time>.json` and, on request, `samples_<task>_<time>.jsonl` beside it.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, sanitize_list, sanitize_model_name

from unlearn.distributed import fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import writing


def check_output(out: Path, model_name: str, *, overwrite: bool) -> None:
    """Find out before a long run whether its results can be written; every rank raises if rank 0 does.

    Raises:
        UserError: the folder cannot be written, or holds results of this model and `overwrite` is not set.
    """
    with fail_together():
        if is_main():
            _prepare(out, model_name, overwrite)


def write_result(result: dict[str, Any], out: Path, *, overwrite: bool = False, samples: bool = False) -> Path | None:
    """Write a result of `Evaluation.run`. Every rank must call it; rank 0 writes, and if it fails they all do.

    Each file is written under a temporary name and renamed, the results last: where they are, the samples are whole.

    Args:
        result: left unchanged.
        overwrite: remove older results of the same model once the new ones are there.
        samples: also write every question with its prompts and log-likelihoods.

    Returns:
        The path of `results_<time>.json` on rank 0, None elsewhere.

    Raises:
        UserError: as `check_output`.
    """
    stamp = datetime.fromtimestamp(result["date"]).isoformat().replace(":", "-")
    folder = _folder(out, result["model_name"])
    file = folder / f"results_{stamp}.json"
    with fail_together():
        if is_main():
            _prepare(out, result["model_name"], overwrite)
            _write_all(result, file, overwrite, samples)
    return file if is_main() else None


def _write_all(result: dict[str, Any], file: Path, overwrite: bool, wanted: bool) -> None:
    """Write samples, then `file`, then remove what they replace."""
    folder, stamp = file.parent, file.stem.removeprefix("results_")
    old = _results(folder) + sorted(folder.glob("samples_*.jsonl"))
    new = []
    for task, samples in result["samples"].items() if wanted else ():
        new.append(folder / f"samples_{task}_{stamp}.jsonl")
        _write(new[-1], (_dump(_sample(sample)) + "\n" for sample in samples))
    summary = {key: value for key, value in result.items() if key not in ("samples", "answers")}
    _write(file, [_dump(summary, indent=2), "\n"])
    for path in old:
        if overwrite and path not in [file, *new]:
            path.unlink()


def _folder(out: Path, model_name: str) -> Path:
    return Path(out).expanduser() / sanitize_model_name(model_name)


def _results(folder: Path) -> list[Path]:
    return sorted(folder.glob("results_*.json"))


def _prepare(out: Path, model_name: str, overwrite: bool) -> None:
    """Make the folder, try whether it takes a file, and whether it is free."""
    folder = _folder(out, model_name)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError as error:
        raise UserError(f"expected a folder for results at {folder}; found a file: choose another --out") from error
    if not overwrite and _results(folder):
        raise UserError(
            f"expected no results in {folder}; found {_results(folder)[0].name}: "
            "choose another --out, or replace them with --overwrite"
        )


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """One question as lm-eval writes it: requests by name, numbers of the responses as strings."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(request)}
        for i, request in enumerate(sample["arguments"])
    }
    texts = {key: sanitize_list(sample[key]) for key in ("resps", "filtered_resps")}
    return {**sample, **texts, "arguments": arguments, "target": str(sample["target"])}


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def _write(path: Path, parts: Iterable[str]) -> None:
    """Write `parts` to a temporary name and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path), temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(parts)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
