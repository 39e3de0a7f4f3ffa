"""Corpora, windows and the global order."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from unlearn.batches import Batches
from unlearn.corpus import Corpus, read_corpus, split_windows
from unlearn.errors import UserError

pytestmark = pytest.mark.usefixtures("token_cache")
ROWS = [
    {"title": "Flint", "abstract": "", "text": "flint garnet"},
    {"title": "Iron", "abstract": "ember", "text": "x y"},
]
JOINED = ["Flint\n\nflint garnet", "Iron\n\nember\n\nx y"]


def decoded(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(window) for window in corpus.windows]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved-splits"])
def test_every_form_gives_the_same_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    path = tmp_path / f"corpus.{form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif form == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(path))
    assert decoded(read_corpus(str(path), tokenizer, seq_len=128), tokenizer) == JOINED


def test_column_template_page_and_text_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    by_column = read_corpus(str(path), tokenizer, seq_len=128, column="title")
    assert decoded(by_column, tokenizer) == ["Flint", "Iron"]
    by_template = read_corpus(str(path), tokenizer, seq_len=128, template="{title}: {text}")
    assert decoded(by_template, tokenizer) == ["Flint: flint garnet", "Iron: x y"]
    path.write_text(json.dumps({"page": "jasper kaolin"}))
    assert decoded(read_corpus(str(path), tokenizer, seq_len=128), tokenizer) == ["jasper kaolin"]
    text = tmp_path / "corpus.txt"
    text.write_text("first document\n\nsecond document\n")
    assert decoded(read_corpus(str(text), tokenizer, seq_len=128), tokenizer) == ["first document", "second document"]


@pytest.mark.parametrize("length", [2, 7, 8, 9, 15, 16, 17, 100])
def test_windows_drop_nothing_and_leave_no_single_token(length: int) -> None:
    document = np.arange(length)
    windows = split_windows(document, 8)
    assert np.array_equal(np.concatenate(windows), document)
    assert all(2 <= len(window) <= 8 for window in windows) and len(windows) == -(-length // 8)


def test_replaced_file_gives_its_new_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "corpus.jsonl"
    for word in ("basalt", "cobalt"):
        path.write_text(json.dumps({"text": f"{word} ember"}))
        assert decoded(read_corpus(str(path), tokenizer, seq_len=128), tokenizer) == [f"{word} ember"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "found nothing at"),
        ("empty.jsonl", b"", "empty file"),
        ("blank.jsonl", b'{"text": "  "}', "found none"),
        ("other.jsonl", b'{"body": "words here"}', "text column 'page'.*found body"),
        ("broken.jsonl", b'{"text": "words', "damaged"),
        ("broken.parquet", b"PAR1 nonsense", "damaged"),
        ("corpus.xml", b"<text>words</text>", "ending in .jsonl"),
        ("single.jsonl", b'{"text": "a"}\n{"text": "b"}', "found 2 of a single token"),
        ("latin.txt", "caf\xe9 words".encode("latin-1"), "damaged"),
    ],
)
def test_bad_corpora(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_corpus(str(tmp_path / name), tokenizer, seq_len=16)


def test_wrong_column_template_folder_and_hub_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="'body'.*title, abstract, text"):
        read_corpus(str(path), tokenizer, seq_len=16, column="body")
    with pytest.raises(UserError, match="template over the columns"):
        read_corpus(str(path), tokenizer, seq_len=16, template="{body}")
    path.unlink()
    with pytest.raises(UserError, match="save_to_disk"):
        read_corpus(str(tmp_path), tokenizer, seq_len=16)
    with pytest.raises(UserError, match="hf download --repo-type dataset somebody/corpus"):
        read_corpus("somebody/corpus", tokenizer, seq_len=16)


def corpus_of(count: int) -> Corpus:
    return Corpus("test", count, [np.arange(2 + index % 5) + index for index in range(count)])


def test_each_epoch_is_a_permutation_and_the_last_batch_is_short() -> None:
    batches = Batches(corpus_of(23), examples=10, total=20, batch=8, seed=0, tag="forget")
    assert batches.unique == batches.chosen == 10 and batches.steps == 3
    assert [len(batches.indices(step)) for step in range(3)] == [8, 8, 4]
    order = [index for step in range(3) for index in batches.indices(step)]
    assert sorted(order[:10]) == sorted(order[10:]) and len(set(order[:10])) == 10
    assert order[:10] != order[10:]


def test_order_depends_on_seed_and_tag() -> None:
    def order(seed: int, tag: str) -> list[int]:
        return Batches(corpus_of(50), examples=50, total=50, batch=50, seed=seed, tag=tag).indices(0)

    assert order(0, "forget") == order(0, "forget")
    assert order(0, "forget") != order(1, "forget") and order(0, "forget") != order(0, "retain")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_global_batch(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    batches = Batches(corpus_of(23), examples=23, total=23, batch=10, seed=0, tag="forget", micro_batch=3)
    monkeypatch.setattr("unlearn.batches.world_size", lambda: world_size)
    for step in range(batches.steps):
        seen, turns = {}, set()
        for rank in range(world_size):
            monkeypatch.setattr("unlearn.batches.rank", lambda rank=rank: rank)
            mine = list(batches.micro_batches(step, torch.device("cpu")))
            turns.add(len(mine))
            for rows in mine:
                where = rows.real // rows.input_ids.shape[1]
                for row, key in enumerate(rows.keys.tolist()):
                    if (where == row).any():
                        seen[key] = rows.at_real(rows.input_ids)[where == row].tolist()
                following = [token for key in rows.keys.tolist() for token in seen.get(key, [])[1:]]
                assert rows.next_ids().tolist() == following
        assert len(turns) == 1  # as many forward passes on every rank
        expected = [batches.corpus.windows[index].tolist() for index in batches.indices(step)]
        assert sorted(seen.values()) == sorted(expected) and len(seen) == len(expected)
        assert batches.tokens(step) == sum(map(len, expected))
        assert batches.targets(step) == sum(len(window) - 1 for window in expected)


def test_unique_examples_are_those_that_are_trained_on() -> None:
    assert Batches(corpus_of(23), examples=20, total=6, batch=3, seed=0, tag="retain").unique == 6
