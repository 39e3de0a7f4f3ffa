"""A corpus sampled from a model: the same texts at any number of ranks, and after any interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from distributed.harness import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import unlearn.sample
from unlearn.corpus import read_corpus
from unlearn.errors import UserError
from unlearn.sample import Row, draw, sample, start_tokens, write_batch
from unlearn.sample_config import SampleConfig
from unlearn.seeding import generator


def _config(home: Path, output: Path, **flags: object) -> SampleConfig:
    base = SampleConfig(
        model=str(home / "model"), output=str(output), examples=11, tokens=9, batch=2, dtype="fp32", device="cpu"
    )
    return replace(base, **flags)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an undisturbed command on one rank writes."""
    file = tmp_path_factory.mktemp("whole") / "texts.jsonl"
    sample(_config(home, file))
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    return file.read_bytes()


def _rows(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.decode().splitlines()]


def test_texts_are_different_and_in_order(whole: bytes) -> None:
    rows = _rows(whole)
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert len({row["text"] for row in rows}) == len(rows) > 5


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_file(home: Path, tmp_path: Path, whole: bytes, ranks: int) -> None:
    """11 texts in batches of 2 are 6 batches: with 3 ranks the last batch, half full, is another rank's."""
    run_ranks(ranks, lambda: sample(_config(home, tmp_path / "texts.jsonl")))
    assert (tmp_path / "texts.jsonl").read_bytes() == whole


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_killed_and_resumed_writes_the_same_file(
    home: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Killed in the fourth batch, with `cut` bytes of the third not on disk yet; what is whole is not written again."""
    asked: list[int] = []

    def dies(*args: object) -> list[Row]:
        asked.append(args[-1])  # type: ignore[arg-type]
        if len(asked) == 4:
            raise KeyboardInterrupt
        return write_batch(*args)  # type: ignore[arg-type]

    config = _config(home, tmp_path / "texts.jsonl")
    monkeypatch.setattr(unlearn.sample, "write_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(config)
    partial = tmp_path / "texts.jsonl.partial"
    content = partial.read_bytes()
    partial.write_bytes(content[: len(content) - cut])
    sample(config)
    assert (tmp_path / "texts.jsonl").read_bytes() == whole
    assert asked[4:] == list(range(3 if cut == 0 else 2, 6))
    assert [entry.name for entry in tmp_path.iterdir()] == ["texts.jsonl"]


def test_resumed_at_another_number_of_ranks(home: Path, tmp_path: Path, whole: bytes) -> None:
    run_ranks(2, lambda: _interrupted(home, tmp_path / "texts.jsonl"))
    sample(_config(home, tmp_path / "texts.jsonl"))
    assert (tmp_path / "texts.jsonl").read_bytes() == whole


def _interrupted(home: Path, output: Path) -> None:
    """Two ranks write two batches, and end before the third and fourth."""
    genuine = unlearn.sample.write_batch

    def stops(*args: object) -> list[Row]:
        if args[-1] in (2, 3):
            raise UserError("stopped")
        return genuine(*args)  # type: ignore[arg-type]

    unlearn.sample.write_batch = stops  # type: ignore[assignment]
    with pytest.raises(UserError, match="stopped"):
        sample(_config(home, output))


def test_other_flags_do_not_go_on_with_it(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    output.with_name("texts.jsonl.partial").write_text('{"seed": 7}\n')
    with pytest.raises(UserError, match="found others"):
        sample(_config(home, output))
    sample(_config(home, output, overwrite=True))
    with pytest.raises(UserError, match="expected a new file"):
        sample(_config(home, output))


def test_parquet_and_jsonl_are_corpora(
    home: Path, tmp_path: Path, whole: bytes, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample(_config(home, tmp_path / "texts.parquet"))
    assert pq.read_table(tmp_path / "texts.parquet").to_pylist() == _rows(whole)
    (tmp_path / "texts.jsonl").write_bytes(whole)
    for name in ("texts.parquet", "texts.jsonl"):
        assert len(read_corpus(str(tmp_path / name), tokenizer, seq_len=64).windows) > 0


def test_greedy_limit_is_what_transformers_generates(home: Path, tmp_path: Path) -> None:
    """A nucleus of one token is greedy decoding, cache and all."""
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    config = _config(home, tmp_path / "x.jsonl", start="amber basalt", top_p=1e-9, tokens=20)
    start = start_tokens(tokenizer, config, 128)
    rows = write_batch(model, tokenizer, start, config, 0)
    expected = model.generate(torch.tensor([start]), max_new_tokens=20, do_sample=False)[0]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert [row["text"] for row in rows] == [text, text] and text.startswith("amber basalt")


def test_draw_has_the_tempered_distribution() -> None:
    """20,000 draws: each frequency within five standard deviations of its probability."""
    logits, count = torch.tensor([2.0, 0.0, 1.0, -1.0]), 20_000
    numbers = torch.rand(count, generator=generator(0, "draws"), dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        drawn = draw(logits.expand(count, -1), numbers, temperature, 1.0)
        expected = (logits.double() / temperature).softmax(-1)
        found = torch.bincount(drawn, minlength=4) / count
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_nucleus_is_the_fewest_likeliest_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, -1)
    numbers = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(draw(logits, numbers, 1.0, top_p).tolist()) == kept


def test_wrong_flags_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="end in .jsonl or .parquet"):
        _config(home, tmp_path / "texts.txt")
    for flags in ({"temperature": 0.0}, {"top_p": 1.5}, {"examples": 0}):
        with pytest.raises(UserError, match="expected --"):
            _config(home, tmp_path / "texts.jsonl", **flags)
    with pytest.raises(UserError, match="128 positions"):
        sample(_config(home, tmp_path / "texts.jsonl", tokens=128))
