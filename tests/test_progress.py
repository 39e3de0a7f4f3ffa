"""Progress bars."""

from pathlib import Path
from typing import Any

import pytest

import unlearn.corpus_texts
import unlearn.weights
from unlearn.corpus_texts import read_texts
from unlearn.model import load_model
from unlearn.progress import progress


@pytest.mark.parametrize(("value", "seen"), [("", True), ("0", True), ("1", False)])
def test_bars_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, seen: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    with progress(3, "reading", "text") as bar:
        bar.update(3)
    assert ("reading:" in capsys.readouterr().err) == seen


def test_loading_and_reading_count_what_they_read(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it takes a moment nothing shows."""
    bars: list[Any] = []

    def kept(*args: Any, **kwargs: Any) -> Any:
        bars.append(progress(*args, **kwargs))
        return bars[-1]

    for module in (unlearn.weights, unlearn.corpus_texts):
        monkeypatch.setattr(module, "progress", kept)
    model = load_model(str(home / "model"))
    texts = read_texts(str(home / "forget.jsonl")).texts
    tensors, rows = bars
    assert tensors.n == tensors.total == len(list(model.parameters())) and rows.n == len(texts) > 0
    assert capsys.readouterr().err == ""
