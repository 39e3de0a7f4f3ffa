"""Progress bars."""

import pytest

from unlearn.progress import progress


@pytest.mark.parametrize(("value", "seen"), [("", True), ("0", True), ("1", False)])
def test_bars_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, seen: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    with progress(3, "reading", "text") as bar:
        bar.update(3)
    assert ("reading:" in capsys.readouterr().err) == seen
