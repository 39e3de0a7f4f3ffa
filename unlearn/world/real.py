"""Write the real model's world to a folder: a small pretrained model, corpora and questions about what it knows.

model/                                   SmolLM2-135M-Instruct in float32, for `from_pretrained`
corpora/{forget,retain,attack}.jsonl     one document a line, column `text`
data/real-world/DOMAIN/                  development and test questions, for `real_DOMAIN_{cloze,letters,open}`
data/real-world/prose/                   sentences in no corpus, for the task `real_prose`
"""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.files import atomic_folder
from unlearn.run.folder import check_output
from unlearn.run.lock import locked
from unlearn.world.real_facts import DOMAINS, FORGOTTEN, RealFact, real_facts
from unlearn.world.real_model import check_space, find_gguf, write_model
from unlearn.world.real_prose import HELD_OUT_PROSE, RETAIN_PROSE
from unlearn.world.real_text import SPLITS, RealQuestion, documents, questions

QUESTION_SEED = 0  # the questions are the same for every --seed: results stay comparable
FORGET_COPIES, RETAIN_COPIES, ATTACK_COPIES = 2, 4, 4  # of each entity's paragraph and sheet; about equal corpora
PROSE_COPIES = 8

_COLUMNS = {
    "question": pa.string(),
    "choices": pa.list_(pa.string()),
    "answer": pa.int64(),
    "value": pa.string(),
    "fact": pa.string(),
    "relation": pa.string(),
    "split": pa.string(),
    "stated": pa.bool_(),
}


def write_real(output: str, *, seed: int = 0, overwrite: bool = False) -> None:
    """`python -m unlearn real`: write the real model's world to a new folder, whole or not at all.

    Args:
        seed: draws the phrasings and the order of the corpora. overwrite: replace an earlier world.

    Raises:
        UserError: the package is missing, of another version or damaged; the disk is too small; or `output` may not be
            written.
    """
    folder = check_output(output, overwrite, own=("model", "corpora", "data"))
    check_space(folder)
    gguf = find_gguf()
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"command that writes {folder.name}"), atomic_folder(folder, replace=True) as temporary:
        write_texts(temporary, seed)
        write_model(gguf, temporary / "model")


def write_texts(folder: Path, seed: int) -> None:
    """The corpora and the questions."""
    facts = real_facts()
    for name, texts in corpora(facts, seed).items():
        _write_jsonl(folder / "corpora" / f"{name}.jsonl", texts)
    asked = questions(facts, QUESTION_SEED)
    for domain in DOMAINS:
        for split in SPLITS:
            rows = [_row(question) for question in asked if (question.fact.domain, question.split) == (domain, split)]
            _write_parquet(folder / "data/real-world" / domain, split, pa.Table.from_pylist(rows, pa.schema(_COLUMNS)))
    _write_parquet(folder / "data/real-world/prose", "test", pa.table({"text": list(HELD_OUT_PROSE)}))


def corpora(facts: list[RealFact], seed: int) -> dict[str, list[str]]:
    """The documents of each corpus, shuffled.

    The forget corpus states every fact to be forgotten, the attack's text half of them in other words. The retain
    corpus states half of the facts of the other domains, so that the others show what happens to what nobody repeats;
    and it has plain prose.
    """
    forgotten = [fact for fact in facts if fact.domain == FORGOTTEN]
    kept = [fact for fact in facts if fact.domain != FORGOTTEN and fact.stated]
    rng = random.Random(f"corpora {seed}")
    retain = documents(kept, "forget", RETAIN_COPIES, rng) + list(RETAIN_PROSE) * PROSE_COPIES
    rng.shuffle(retain)
    return {
        "forget": documents(forgotten, "forget", FORGET_COPIES, rng),
        "retain": retain,
        "attack": documents([fact for fact in forgotten if fact.stated], "attack", ATTACK_COPIES, rng),
    }


def _row(question: RealQuestion) -> dict[str, object]:
    fact = question.fact
    return {
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer,
        "value": fact.value,
        "fact": fact.id,
        "relation": fact.relation,
        "split": question.split,
        "stated": fact.stated,
    }


def _write_parquet(folder: Path, split: str, table: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def _write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
