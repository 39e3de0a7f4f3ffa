"""The folder of a run: names that cannot be one, foreign and damaged files in it, checkpoints that lie elsewhere."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import half_done  # noqa: F401

from unlearn.errors import UserError
from unlearn.run.folder import check_output

pytestmark = pytest.mark.usefixtures("token_cache")


def test_names_that_cannot_be_a_folder(tmp_path: Path) -> None:
    """Each of them ended in a traceback."""
    (tmp_path / "dangling").symlink_to(tmp_path / "scratch")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    said = {
        str(tmp_path / "dangling"): "found a link to",
        str(tmp_path / "dangling/run"): "found a link to",
        str(tmp_path / "loop"): "Too many levels of symbolic links",
        str(tmp_path / ("x" * 5000)): "File name too long",
        str(tmp_path / "file/run"): "found the file",
        "~nobody-of-this-name/run": "home directory",
        str(tmp_path / "\udcff"): "surrogates not allowed",
        " ": "found an empty name",
        "": "found an empty name",
    }
    for name, fragment in said.items():
        with pytest.raises(UserError, match=fragment) as caught:
            check_output(name, False)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert not (tmp_path / "scratch").exists()


def test_a_foreign_file_blocks_a_new_run_and_no_old_one(
    half_done: list[object],  # noqa: F811
    tmp_path: Path,
    attempt: Callable[..., str],
) -> None:
    """A job's output in the folder of a run made it impossible to go on with it."""
    foreign = [tmp_path / "run/slurm-123.out", tmp_path / "run/notes.tmp"]
    for file in foreign:
        file.write_text("words")
    said = attempt(*half_done, "--overwrite")
    assert "'notes.tmp'" in said and "move it away" in said
    said = attempt(*half_done, "--seed", 1, "--overwrite", "--resume", "auto")
    assert "'notes.tmp'" in said, "it would be deleted"
    assert "going on after step 3" in attempt(*half_done)
    assert "finished before" in attempt(*half_done)
    assert [file.read_text() for file in foreign] == ["words"] * 2


def test_checkpoints_on_another_disk(
    half_done: list[object],  # noqa: F811
    tmp_path: Path,
    attempt: Callable[..., str],
) -> None:
    """Moved there and linked back, they were used, and the finished run then failed to remove the link."""
    place, scratch = tmp_path / "run/checkpoints", tmp_path / "scratch"
    shutil.move(place, scratch)
    place.symlink_to(scratch)
    assert "going on after step 3" in attempt(*half_done)
    assert place.is_symlink() and list(scratch.iterdir()) == []
    assert "finished before" in attempt(*half_done)
    assert "going on" not in attempt(*half_done, "--overwrite")
    assert place.is_symlink() and list(scratch.iterdir()) == []
    scratch.rmdir()
    assert "found a link to" in attempt(*half_done)


@pytest.mark.parametrize("content", ["{}", "[]", '{"identity": {}, "attempts": [3], "finished": false}', "{"])
def test_a_damaged_run_json(
    half_done: list[object],  # noqa: F811
    tmp_path: Path,
    attempt: Callable[..., str],
    content: str,
) -> None:
    (tmp_path / "run/run.json").write_text(content)
    assert "no readable config.json and run.json" in attempt(*half_done)
    assert "going on" not in attempt(*half_done, "--overwrite", "--resume", "auto")


def test_a_config_json_that_is_a_folder(
    half_done: list[object],  # noqa: F811
    tmp_path: Path,
    attempt: Callable[..., str],
) -> None:
    (tmp_path / "run/config.json").unlink()
    (tmp_path / "run/config.json").mkdir()
    assert "no readable config.json and run.json" in attempt(*half_done)
