"""The cache of tokenised text: used, checked, and made again where it is damaged."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import WORDS, write_corpus
from transformers import PreTrainedTokenizerFast

from unlearn.corpus import Corpus, read_corpus
from unlearn.errors import UserError


def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    return read_corpus(str(tmp_path / "corpus.jsonl"), tokenizer, seq_len=16)


@pytest.fixture
def cached(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, token_cache: Path) -> Path:
    """The cache's one file, once a corpus was read."""
    write_corpus(tmp_path / "corpus.jsonl", WORDS)
    read(tmp_path, tokenizer)
    (file,) = (token_cache / "unlearn-tokens").iterdir()
    return file


def test_second_reading_comes_from_the_cache(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cached: Path) -> None:
    stamp = cached.stat().st_mtime_ns
    first, second = read(tmp_path, tokenizer), read(tmp_path, tokenizer)
    assert cached.stat().st_mtime_ns == stamp
    assert all(np.array_equal(a, b) for a, b in zip(first.windows, second.windows, strict=True))


@pytest.mark.parametrize("damage", ["halved", "emptied", "junk", "numbers", "another's"])
def test_a_damaged_file_is_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cached: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every later run with this corpus failed until the file was found and deleted; changed numbers went unseen."""
    whole, expected = cached.read_bytes(), read(tmp_path, tokenizer).sha256()
    half, quarter = len(whole) // 2, len(whole) // 4
    with pa.BufferOutputStream() as other, pa.ipc.new_file(other, pa.schema({"tokens": pa.int32()})):
        pass
    contents = {
        "halved": whole[:half],
        "emptied": b"",
        "junk": b"junk" * 100,
        "numbers": whole[:quarter] + bytes(64) + whole[quarter + 64 :],
        "another's": other.getvalue().to_pybytes(),
    }
    cached.write_bytes(contents[damage])
    assert read(tmp_path, tokenizer).sha256() == expected
    assert f"warning: tokenised text in {cached} is damaged" in capsys.readouterr().out
    assert read(tmp_path, tokenizer).sha256() == expected
    assert "warning" not in capsys.readouterr().out


def test_a_file_in_the_place_of_the_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, token_cache: Path
) -> None:
    write_corpus(tmp_path / "corpus.jsonl", WORDS)
    token_cache.mkdir()
    (token_cache / "unlearn-tokens").write_text("")
    with pytest.raises(UserError, match="expected to write tokenised text .* set HF_DATASETS_CACHE"):
        read(tmp_path, tokenizer)


def test_nothing_is_left_on_a_full_disk(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk was a traceback, and left a temporary file in the cache for good."""

    def full(file: str, mode: str) -> pa.NativeFile:
        assert (token_cache / "unlearn-tokens").is_dir() and mode == "wb"
        return pa.PythonFile(open("/dev/full", "wb"))  # noqa: SIM115

    write_corpus(tmp_path / "corpus.jsonl", WORDS)
    monkeypatch.setattr("unlearn.token_cache.pa.OSFile", full)
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        read(tmp_path, tokenizer)
    assert list((token_cache / "unlearn-tokens").iterdir()) == []


def test_documents_of_one_token_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, token_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them ended the run, and named neither its line nor how many there are."""
    texts = ["basalt ember", "a", "", "flint garnet", "b"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = read(tmp_path, tokenizer)
    assert corpus.documents == 2 and len(corpus.windows) == 2
    said = capsys.readouterr().out
    assert "warning: left out 2 of the documents" in said and "(the first is 'a', line 2)" in said
