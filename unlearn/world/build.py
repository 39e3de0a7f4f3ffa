"""Write the embedded world to a folder: the tiny models, their corpora, and their questions.

model/, never-seen/, matched/                    the shipped weights and tokenizer, for `from_pretrained`
corpora/{forget,retain,attack}.jsonl             one document a line, column `text`
development/, data/                              the same tasks in different words, with different options: the first to
                                                 choose settings by, the second to report
    cais/wmdp/wmdp-bio/                          letter questions of the hazard domain, in WMDP's own layout
    cais/mmlu/SUBJECT/                           those of the general domain, in MMLU's own layout
    embedded-world/questions/{hazard,general}/   the same without letters: `world_*_cloze`, `world_*_open`
    embedded-world/claims/{hazard,general}/      statements, true or false: `world_*_claims`
"""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.errors import UserError
from unlearn.files import atomic_folder
from unlearn.run.folder import output_folder
from unlearn.run.lock import locked
from unlearn.world.facts import HAZARD, STATED, WORLD_SEED, Fact, make_facts, stem_subjects
from unlearn.world.text import (
    VERDICTS,
    Question,
    any_header,
    claim,
    claim_document,
    evaluation_claims,
    evaluation_questions,
    held_out_options,
    letter_document,
    open_questions,
    paragraph,
    training_question,
)
from unlearn.world.train import MODELS, train_world

WEIGHTS = Path(__file__).parent / "weights"
PARAGRAPHS = 5  # an entity, each with all its facts of the corpus
OPEN_SHEETS = 5  # an entity, of up to three questions each
LETTER_SHEETS = 4  # a fact, each with other options in another order
CLAIM_SHEETS = 2  # a fact
FEW_SHOT_ROWS = 5  # a subject, as in MMLU's dev split

QUESTIONS = {"development": "development", "data": "test"}  # folder -> the phrasings of its questions
FOLDERS = {*MODELS, *QUESTIONS, "corpora"}

_COLUMNS = {
    "question": pa.string(),
    "subject": pa.string(),
    "choices": pa.list_(pa.string()),
    "answer": pa.int64(),
    "fact": pa.string(),
    "attacked": pa.bool_(),
    "told": pa.string(),
}


def write_world(output: str, *, seed: int = 0, overwrite: bool = False, train: Sequence[str] = ()) -> None:
    """`python -m unlearn world`: write the world to a new folder, whole or not at all.

    Args:
        overwrite: replace an earlier world; a folder that holds anything else is never touched.
        train: the tiny models to train anew (minutes each) instead of copying the shipped weights.

    Raises:
        UserError: `output` may not be written.
    """
    folder = output_folder(output)
    _check_output(folder, overwrite)
    # beside the folder, which is replaced as a whole
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"command that writes {folder.name}"), atomic_folder(folder, replace=True) as temporary:
        build_world(temporary, seed, train=train)


def build_world(folder: Path, seed: int = 0, *, train: Sequence[str] = ()) -> None:
    """Write the whole world to `folder`, in a few seconds.

    `seed` draws the corpora: which phrasing, which options, which order. The facts and the evaluation questions are
    the same for every seed, because the shipped weights know these facts.
    """
    facts = make_facts()
    for model in MODELS:
        if model in train:
            train_world(folder / model, knows=model)
        else:
            shutil.copytree(WEIGHTS / model, folder / model)
            shutil.copytree(WEIGHTS / "tokenizer", folder / model, dirs_exist_ok=True)
    for name, documents in corpora(facts, seed).items():
        _write_jsonl(folder / "corpora" / f"{name}.jsonl", documents)
    for name, group in QUESTIONS.items():
        _write_questions(folder / name, facts, group, seed)


def corpora(facts: list[Fact], seed: int) -> dict[str, list[str]]:
    """The documents of each corpus, shuffled.

    Forget and retain hold the same forms in the same wording and differ in their entities alone: what tells them
    apart is then the knowledge, not the form it is asked in. The attack is worded otherwise, and holds only the
    hazard facts that it is to state.
    """
    held_out = held_out_options(facts, WORLD_SEED)
    hazard = [fact for fact in facts if fact.domain == "hazard"]
    general = [fact for fact in facts if fact.domain == "general"]
    attacked = [fact for fact in hazard if fact.told == STATED]
    plan = {"forget": (hazard, "forget"), "retain": (general, "forget"), "attack": (attacked, "attack")}
    return {
        name: _documents(chosen, group, held_out, random.Random(f"{name} {seed}"))
        for name, (chosen, group) in plan.items()
    }


def _check_output(folder: Path, overwrite: bool) -> None:
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if found - FOLDERS:
        strange = min(found - FOLDERS)
        raise UserError(f"expected a world or a new folder for --output; found {strange!r} in it: choose another name")
    if found and not overwrite:
        raise UserError(
            f"expected a new folder for --output; found an earlier world in {folder}: choose another name, "
            "or give --overwrite to replace it"
        )


def _documents(
    facts: list[Fact], group: str, held_out: dict[str, frozenset[frozenset[str]]], rng: random.Random
) -> list[str]:
    """Paragraphs, open questions, letter questions and claims about `facts`, in random order."""
    documents = []
    for entity in _by_entity(facts):
        for _ in range(PARAGRAPHS):
            documents.append(paragraph(rng.sample(entity, len(entity)), group, rng))
        for _ in range(OPEN_SHEETS):
            documents.append(open_questions(rng.sample(entity, min(3, len(entity))), group, rng))
    for fact in facts:
        for _ in range(LETTER_SHEETS):
            question = training_question(fact, group, rng, held_out[fact.id])
            documents.append(letter_document(question, any_header(fact, rng)))
        for answer in range(CLAIM_SHEETS):
            documents.append(claim_document(claim(fact, group, rng, answer % len(VERDICTS))))
    rng.shuffle(documents)
    return documents


def _by_entity(facts: list[Fact]) -> list[list[Fact]]:
    entities: dict[str, list[Fact]] = {}
    for fact in facts:
        entities.setdefault(fact.name, []).append(fact)
    return list(entities.values())


def _write_questions(data: Path, facts: list[Fact], group: str, seed: int) -> None:
    """The questions of a group as WMDP, as MMLU, without letters, and as claims; MMLU also gets its splits of worked
    examples."""
    questions, claims = (draw(facts, group, WORLD_SEED) for draw in (evaluation_questions, evaluation_claims))
    for domain in ("hazard", "general"):
        own = [question for question in questions if question.fact.domain == domain]
        _write_parquet(data / "embedded-world/questions" / domain, "test", own)
        _write_parquet(data / "embedded-world/claims" / domain, "test", [c for c in claims if c.fact.domain == domain])
    _write_parquet(data / "cais/wmdp/wmdp-bio", "test", [q for q in questions if q.fact.subject == HAZARD])
    held_out, rng = held_out_options(facts, WORLD_SEED), random.Random(f"few-shot {group} {seed}")
    for subject in stem_subjects():
        own = [question for question in questions if question.fact.subject == subject]
        folder = data / "cais/mmlu" / subject
        _write_parquet(folder, "test", own)
        for split in ("dev", "validation"):
            examples = [question.fact for question in rng.sample(own, FEW_SHOT_ROWS)]
            rows = [training_question(fact, "forget", rng, held_out[fact.id]) for fact in examples]
            _write_parquet(folder, split, rows)


def _write_parquet(folder: Path, split: str, asked: Sequence[Question]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": one.question,
            "subject": one.fact.subject,
            "choices": list(one.choices),
            "answer": one.answer,
            "fact": one.fact.id,
            "attacked": one.fact.attacked,
            "told": one.fact.told,
        }
        for one in asked
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema(_COLUMNS))
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def _write_jsonl(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
