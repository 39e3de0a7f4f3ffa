"""What of a corpus is text, in which forms it is read, and what is refused."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import tiny_model, tiny_tokenizer

from unlearn import assemble, fit_lens
from unlearn.config import TrainConfig
from unlearn.corpus_texts import read_texts
from unlearn.errors import UserError
from unlearn.fit_config import FitLensConfig
from unlearn.model import save_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"
ROWS: list[dict[str, Any]] = [{"text": "flint garnet"}, {"text": "iron\u2028ember\x0c\x85caf\u00e9"}]
WANTED = ["flint garnet", "iron\u2028ember\x0c\x85caf\u00e9"]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


FORMS: dict[str, bytes] = {
    "x.jsonl": jsonl(*ROWS),
    "x.JSONL": jsonl(*ROWS),
    "crlf.jsonl": jsonl(*ROWS).replace(b"\n", b"\r\n\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(*ROWS),
    "lines.json": jsonl(*ROWS),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "x.jsonl.gz": gzip.compress(jsonl(ROWS[0])) + gzip.compress(jsonl(ROWS[1])),
    "x.JSONL.GZ": gzip.compress(jsonl(*ROWS)),
    "x.jsonl.zst": pa.compress(jsonl(ROWS[0]), "zstd", asbytes=True)
    + pa.compress(jsonl(ROWS[1]), "zstd", asbytes=True),
    "x.csv": 'text\nflint garnet\n\n"iron\u2028ember\x0c\x85caf\u00e9"\n'.encode(),
    "bom.txt": "\ufeffflint garnet\r\n\r\niron\u2028ember\x0c\x85caf\u00e9".encode(),
    "x.txt.gz": gzip.compress("\n".join(WANTED).encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_one_corpus(tmp_path: Path, name: str) -> None:
    """Lines of text ended at eight more characters than the newline, a byte-order mark was part of the first document,
    and upper-case, packed, comma-separated and array files were refused."""
    assert read_texts(written(tmp_path / name, FORMS[name])).texts == WANTED


def test_dates_and_numbers_in_strings_stay_what_they_are(tmp_path: Path) -> None:
    """The date 2024-01-02 became "2024-01-02 00:00:00" in documents, titles and templates."""
    rows = [{"text": "2024-01-02", "title": "0123"}, {"text": "2024-01-02T03:04:05Z", "title": "1e5"}]
    wanted = ["0123\n\n2024-01-02", "1e5\n\n2024-01-02T03:04:05Z"]
    assert read_texts(written(tmp_path / "x.jsonl", jsonl(*rows))).texts == wanted
    text = "title,text\n0123,2024-01-02\n1e5,2024-01-02T03:04:05Z\n"
    source = written(tmp_path / "x.csv", text.encode())
    assert read_texts(source).texts == wanted
    assert read_texts(source, template="{text}|{{{title}}}").texts == [
        "2024-01-02|{0123}",
        "2024-01-02T03:04:05Z|{1e5}",
    ]


VALUES: list[Any] = [["a", "b"], {"role": "user"}, [{"role": "user", "content": "words"}], True, 3, 0.5]


@pytest.mark.parametrize("value", VALUES)
def test_only_strings_are_text_in_jsonl(tmp_path: Path, value: Any) -> None:
    """Lists, dictionaries, chat messages and numbers became Python's print-out of them, and were trained on."""
    source = written(tmp_path / "x.jsonl", jsonl({"text": "words", "body": "b"}, {"text": "words", "body": value}))
    assert read_texts(source).texts == ["words", "words"]  # of columns that are not named anything may be
    kind = type(value).__name__
    with pytest.raises(UserError, match=f"'body' of .*x.jsonl; found a {kind} .* in line 2"):
        read_texts(source, column="body")
    with pytest.raises(UserError, match=f"found a {kind}"):
        read_texts(source, template="{text} {body}")


@pytest.mark.parametrize("value", [*VALUES, b"one two three"])
def test_only_strings_are_text_in_tables(tmp_path: Path, value: Any) -> None:
    """Bytes in Parquet trained on "b'one two three'"."""
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": None}, {"text": value}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="found a .* in row 2"):
        read_texts(str(tmp_path / "x.parquet"))


def test_a_class_label_is_no_text(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.ClassLabel(names=["yes", "no"])})
    datasets.Dataset.from_dict({"text": [0, 1]}, features=features).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"found a int \(0\) in row 1"):
        read_texts(str(tmp_path / "x"))


@pytest.mark.parametrize(
    "template",
    ["always the same", "", "{text.__class__}", "{text!r}", "{text:>9}", "{0}", "{}", "{text[0]}", "{", "{body}"],
)
def test_a_template_names_columns_and_nothing_else(tmp_path: Path, template: str) -> None:
    """One without a column made every document the same; others reached into Python's insides."""
    source = written(tmp_path / "x.jsonl", jsonl({"text": "words"}))
    with pytest.raises(UserError, match="expected a template over the columns text"):
        read_texts(source, template=template)


def test_a_row_with_nothing_for_a_template_has_no_document(tmp_path: Path) -> None:
    rows = [{"title": "a", "text": "b"}, {"title": "", "text": None}, {"title": "c"}]
    texts = read_texts(written(tmp_path / "x.jsonl", jsonl(*rows)), template="Title: {title}\n\n{text}").texts
    assert texts == ["Title: a\n\nb", "", "Title: c\n\n"]


def test_pages_beside_texts(tmp_path: Path) -> None:
    """Where both columns are there and a row's text is empty, its page was dropped."""
    rows = [{"text": None, "page": "page one"}, {"text": "two", "page": None}, {"text": "three", "page": 17}]
    wanted = ["page one", "two", "three"]
    assert read_texts(written(tmp_path / "x.jsonl", jsonl(*rows))).texts == wanted
    table = pa.Table.from_pylist(
        [{"text": None, "page": "page one"}], pa.schema({"text": pa.string(), "page": pa.string()})
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert read_texts(str(tmp_path / "x.parquet")).texts == ["page one"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_page_number_of_an_empty_text(tmp_path: Path, form: str) -> None:
    """A row with an empty text trained on its page's number, "12"."""
    rows = [{"text": "", "page": "12"}, {"text": "  ", "page": "13"}, {"text": None, "page": "a page"}]
    if form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    else:
        written(tmp_path / "x.jsonl", jsonl(*rows, {"page": "another"}))
    wanted = ["", "", "a page", *(["another"] if form == "jsonl" else [])]
    assert read_texts(str(tmp_path / f"x.{form}")).texts == wanted


@pytest.mark.parametrize("name", ["title", "abstract"])
def test_a_joined_column_that_nobody_named_says_the_way_out(tmp_path: Path, name: str) -> None:
    """A title that is a number refused the corpus, and the message asked for a column of strings, which it has."""
    source = written(tmp_path / "x.jsonl", jsonl({"text": "words", name: 7}))
    said = f"'{name}' of .*; found a int .* name the column of strings that counts, as in `--retain-column text`"
    with pytest.raises(UserError, match=said):
        read_texts(source, column_flag="--retain-column")
    assert read_texts(source, column="text").texts == ["words"]


def test_every_command_names_its_own_flag(tmp_path: Path, token_cache: Path) -> None:
    """The remedy is a flag of the command that refuses the corpus, and of that corpus."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    good = written(tmp_path / "good.jsonl", jsonl({"text": "some words"}))
    bad = written(tmp_path / "bad.jsonl", jsonl({"text": "words", "title": 7}))
    model, tokenizer = str(tmp_path / "model"), tiny_tokenizer()
    calls = {
        "--forget-column": lambda: assemble._read(TrainConfig(forget=bad), tokenizer, "forget"),
        "--retain-column": lambda: fit_lens._read(FitLensConfig(model=model, output="x", forget=good, retain=bad)),
    }
    for flag, call in calls.items():
        with pytest.raises(UserError, match=f"as in `{flag} text`"):
            call()


def test_parquet_files_that_differ_beside_their_text(tmp_path: Path) -> None:
    """Shards with other integers, strings, order or columns, and a map beside the text, were refused."""
    tables = [
        pa.table({"n": pa.array([1], pa.int32()), "text": pa.array(["one"], pa.string())}),
        pa.table({"text": pa.array(["two"], pa.large_string()), "n": pa.array([2], pa.int64())}),
        pa.table({"text": pa.array(["three"]), "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32()))}),
        pa.table({"text": pa.array(["four"]).dictionary_encode(), "title": ["Title"]}),
    ]
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(table, tmp_path / f"train-{number:05d}-of-00004.parquet")
    found = read_texts(str(tmp_path))
    assert found.texts == ["one", "two", "three", "Title\n\nfour"] and found.place(3) == "row 1"
    pyarrow.parquet.write_table(tables[0], tmp_path / "test-00000-of-00001.parquet")
    assert len(read_texts(str(tmp_path)).texts) == 4  # as on the hub, the split `train`
    (tmp_path / "train-00001-of-00004.parquet").unlink()
    with pytest.raises(UserError, match="expected all files of one set"):
        read_texts(str(tmp_path))


def test_folders_of_files(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", jsonl({"text": "one"}))
    written(tmp_path / "b.jsonl.gz", gzip.compress(jsonl({"text": "two"})))
    written(tmp_path / "README.md", b"about")
    assert read_texts(str(tmp_path)).texts == ["one", "two"]
    written(tmp_path / "c.jsonl", jsonl({"body": "three"}))
    with pytest.raises(UserError, match="column 'text' in .*c.jsonl; found body"):
        read_texts(str(tmp_path))
    pyarrow.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="found both"):
        read_texts(str(tmp_path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.gz"])
def test_files_named_after_splits(tmp_path: Path, suffix: str) -> None:
    """Only splits in numbered files were kept apart: of train.jsonl beside test.jsonl both were trained on."""

    def put(name: str) -> None:
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pa.table({"text": [name]}), tmp_path / f"{name}{suffix}")
        else:
            rows = jsonl({"text": name})
            written(tmp_path / f"{name}{suffix}", gzip.compress(rows) if suffix.endswith(".gz") else rows)

    put("test")
    assert read_texts(str(tmp_path)).texts == ["test"]  # one set is what is meant
    put("Validation")
    with pytest.raises(UserError, match="expected all files of one set in .*; found Validation"):
        read_texts(str(tmp_path))
    for name in ("train_1", "train_2"):
        put(name)
    assert read_texts(str(tmp_path)).texts == ["train_1", "train_2"]
    put("articles")
    with pytest.raises(UserError, match="expected all files of one set in .*articles"):
        read_texts(str(tmp_path))


def test_numbered_files_with_a_hash(tmp_path: Path) -> None:
    """Older Parquet files of the hub end in one: their splits were mixed."""
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pa.table({"text": [split]}), tmp_path / f"{split}-00000-of-00001-a09b74b3ef.parquet"
        )
    assert read_texts(str(tmp_path)).texts == ["train"]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "x.parquet")
    for source in (str(tmp_path / "x.parquet"), written(tmp_path / "x.csv", b"text,text\na,b\n")):
        with pytest.raises(UserError, match="expected one column 'text' .*; found 2"):
            read_texts(source)


MISTAKES: dict[str, tuple[str, bytes, str]] = {
    "pointer": ("x.txt", POINTER, "found a Git LFS pointer"),
    "pointer-parquet": ("x.parquet", POINTER, "found a Git LFS pointer"),
    "latin": ("x.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"), "expected UTF-8"),
    "latin-csv": ("x.csv", "text\ncaf\u00e9\n".encode("latin-1"), "expected UTF-8"),
    "utf-16": ("x.jsonl", '{"text": "words"}'.encode("utf-16"), "expected UTF-8"),
    "key-twice": ("x.jsonl", b'{"text": "a", "text": "b"}', "the key 'text' twice"),
    "cut": ("x.jsonl", jsonl(*ROWS)[:-5], "damaged piece in line 2"),
    "deep": ("x.jsonl", b'{"text": ' + b"[" * 100_000, "damaged piece in line 1"),
    "strings": ("x.jsonl", b'"one"\n"two"\n', "found a str in line 1"),
    "array-of-strings": ("x.json", b'["one", "two"]', "found a str in item 1"),
    "half-a-character": ("x.jsonl", rb'{"text": "caf\ud83d"}', "half a character .* in line 1"),
    "csv-row": ("x.csv", b"text,title\na,b\nc\n", "damaged row in line 3"),
    "cut-gz": ("x.jsonl.gz", gzip.compress(jsonl(*ROWS))[:-9], "whole .jsonl.gz file .* damaged"),
    "not-gz": ("x.jsonl.gz", jsonl(*ROWS), "whole .jsonl.gz file .* damaged"),
    "not-zst": ("x.jsonl.zst", jsonl(*ROWS), "whole .jsonl.zst file .* damaged"),
    "bz2": ("x.jsonl.bz2", bz2.compress(b"x"), "ending in"),
    "packed-parquet": ("x.parquet.gz", b"x", "ending in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path: Path, mistake: str) -> None:
    name, content, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        read_texts(written(tmp_path / name, content))


def test_a_name_that_no_file_has() -> None:
    with pytest.raises(UserError, match="File name too long"):
        read_texts("x" * 5000)
