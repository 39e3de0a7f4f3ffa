"""What an attack must say of itself: text that unlearning has seen, general knowledge that every attacker destroys."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, tiny_tokenizer, write_corpus
from test_commands import flags
from test_evals_envelope import FLOOR, curve

from unlearn.config import config_of
from unlearn.corpus import Corpus, read_corpus
from unlearn.evals.attack.config import TamperConfig
from unlearn.evals.attack.results import Curves, results, table
from unlearn.evals.attack.seen import seen_warnings
from unlearn.evals.judge.envelope import destroyed, recovery

pytestmark = pytest.mark.usefixtures("token_cache")


@pytest.fixture
def run_of(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> Path:
    """A finished run, in windows of 24 tokens, whose forget corpus is its own."""
    corpus = shutil.copy(home / "forget.jsonl", tmp_path / "forget.jsonl")
    assert "unlearned model" in attempt(*flags(home, tmp_path / "run", forget=corpus))
    return tmp_path / "run"


def drawn(path: Path, count: int, seq_len: int = 40) -> dict[str, Corpus]:
    text = read_corpus(str(path), tiny_tokenizer(), seq_len=seq_len)
    return {"forget": Corpus("forget", 0, text.windows[:count])}


def test_attack_text_that_unlearning_has_seen(run_of: Path, tmp_path: Path) -> None:
    """Whether the text was new was the user's word. Windows of the attack may be of another length than the run's."""
    model, tokenizer = str(run_of / "model"), tiny_tokenizer()
    (said,) = seen_warnings(model, drawn(tmp_path / "forget.jsonl", 7), tokenizer, 40)
    assert said.startswith("7 of the 7 windows of forget text") and f"({tmp_path / 'forget.jsonl'})" in said
    new = write_corpus(tmp_path / "new.jsonl", WORDS[:6], seed=9)
    assert seen_warnings(model, drawn(new, 7), tokenizer, 40) == []
    new.write_text(new.read_text() + (tmp_path / "forget.jsonl").read_text().splitlines()[0])
    (said,) = seen_warnings(model, drawn(new, 1000), tokenizer, 40)
    assert said.startswith(("1 of", "2 of"))


def test_a_corpus_that_is_not_there_any_more(run_of: Path, tmp_path: Path) -> None:
    model, tokenizer, text = str(run_of / "model"), tiny_tokenizer(), drawn(tmp_path / "forget.jsonl", 3)
    write_corpus(tmp_path / "forget.jsonl", WORDS[:6], seed=8)
    (said,) = seen_warnings(model, text, tokenizer, 40)
    assert "the forget corpus of the run that made the model cannot be read as it was" in said
    (tmp_path / "forget.jsonl").unlink()
    assert seen_warnings(model, text, tokenizer, 40) == [said]


def test_a_model_of_no_run(home: Path, tmp_path: Path) -> None:
    text = drawn(home / "forget.jsonl", 3)
    assert seen_warnings(str(home / "model"), text, tiny_tokenizer(), 40) == []
    assert seen_warnings("somebody/model", text, tiny_tokenizer(), 40) == []
    for content in ("{", "[]", '{"forget": "a", "retain": "b"}'):
        for name in ("config.json", "run.json"):
            (tmp_path / name).write_text(content)
        assert seen_warnings(str(tmp_path / "model"), text, tiny_tokenizer(), 40) == []


def test_what_every_attack_destroys() -> None:
    brute, brief = curve((0, 0.2), (10, 0.9, 0.3), (20, 0.9, 0.4)), curve((0, 0.2), (5, 0.9, 0.1))
    assert destroyed({"brute": brute, "brief": brief}, FLOOR) == ["mmlu"]
    assert destroyed({"brute": brute, "mild": curve((0, 0.2), (10, 0.3))}, FLOOR) == []
    assert destroyed({"none": curve((0, 0.2))}, FLOOR) == destroyed({"brute": brute}, {}) == []


def test_a_recovery_among_ruins_is_not_known() -> None:
    """`not within 20 steps` read as if the model had held; and steps counted at which no attacker did."""
    brute = curve((0, 0.2), (10, 0.9, 0.3), (20, 0.9, 0.3))
    record = recovery({"brute": brute}, FLOOR, 0.5).record()
    assert record["steps"] is None and record["censored"].startswith("not known: each of 1 attack(s) destroys mmlu")
    held = recovery({"brute": curve((0, 0.2), (10, 0.3), (20, 0.9, 0.3))}, FLOOR, 0.5).record()
    assert held["censored"] == "not within 10 steps or 1,000 tokens by any of 1 attack(s)"


def numbers(acc: float) -> dict[str, Any]:
    return {"acc": acc, "interval": [acc - 0.02, acc + 0.02], "questions": 1000}


def grid(general: float) -> Curves:
    """One attack, after which the general accuracy is `general`; 0.6 before."""
    config: Any = config_of("next-token", TamperConfig)(model="m", output="o", forget="c")
    points = [
        {"step": step, "tokens": step * 10, "tasks": {"wmdp_bio": numbers(hazard), "mmlu_stem": numbers(kept)}}
        for step, hazard, kept in ((0, 0.25, 0.6), (10, 0.7, general))
    ]
    record = {"steps": 10, "unique": 8, "batch": 8, "tokens": 100, "diverged": None, "points": points}
    return Curves(config, {"unlearned": {name: record for name in config.attacks}})


def test_a_general_task_that_every_attack_destroys_is_named() -> None:
    """The table said `no attack`, as of a model that no attack moves."""
    reference = {"wmdp_bio": numbers(0.9)}
    ruins, kept = grid(0.2), grid(0.6)
    assert "every attack destroys mmlu_stem" in table(ruins, reference) and "not known" in table(ruins, reference)
    assert "destroys" not in table(kept, reference)
    written = [results({}, curves, reference, [])["warnings"] for curves in (ruins, kept)]
    assert [sum("every attack on unlearned destroys mmlu_stem" in one for one in found) for found in written] == [1, 0]
    json.dumps(results({}, ruins, reference, []), allow_nan=False)
