"""Write the embedded world to a folder: the tiny model, its corpora, and its questions.

model/                                           the shipped weights and tokenizer, for `from_pretrained`
corpora/{forget,retain,attack}.jsonl             one document a line, column `text`
data/cais/wmdp/wmdp-bio/                         the hazard domain, in WMDP's own layout
data/cais/mmlu/SUBJECT/                          the general domain, in MMLU's own layout
data/embedded-world/cloze/{hazard,general}/      both, for the tasks `world_hazard_cloze` and `world_general_cloze`
"""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.errors import UserError
from unlearn.files import atomic_folder
from unlearn.run.folder import output_folder
from unlearn.run.lock import locked
from unlearn.world.facts import WORLD_SEED, Fact, make_facts, stem_subjects
from unlearn.world.text import (
    Question,
    any_header,
    evaluation_questions,
    letter_document,
    open_questions,
    paragraph,
    training_question,
)
from unlearn.world.train import train_world

WEIGHTS = Path(__file__).parent / "weights"
PARAGRAPHS = 5  # an entity, each with all its facts of the corpus
OPEN_SHEETS = 5  # an entity, of up to three questions each
LETTER_SHEETS = 4  # a fact, each with other options in another order
FEW_SHOT_ROWS = 5  # a subject, as in MMLU's dev split

_COLUMNS = {
    "question": pa.string(),
    "subject": pa.string(),
    "choices": pa.list_(pa.string()),
    "answer": pa.int64(),
    "fact": pa.string(),
    "attacked": pa.bool_(),
}


def write_world(
    output: str, *, seed: int = 0, overwrite: bool = False, train: bool = False, never_seen: bool = False
) -> None:
    """`python -m unlearn world`: write the world to a new folder, whole or not at all.

    Args:
        overwrite: replace an earlier world; a folder that holds anything else is never touched.
        train: train the tiny model anew (minutes) instead of copying the shipped weights.
        never_seen: train it without the hazard domain.

    Raises:
        UserError: `output` may not be written; or the shipped weights are asked not to know what they know.
    """
    if never_seen and not train:
        raise UserError(
            "expected --never-seen with --train; found it alone: the shipped weights know the hazard domain"
        )
    folder = output_folder(output)
    _check_output(folder, overwrite)
    # beside the folder, which is replaced as a whole
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"command that writes {folder.name}"), atomic_folder(folder, replace=True) as temporary:
        build_world(temporary, seed, train=train, never_seen=never_seen)


def build_world(folder: Path, seed: int = 0, *, train: bool = False, never_seen: bool = False) -> None:
    """Write the whole world to `folder`, in a few seconds.

    `seed` draws the corpora: which phrasing, which options, which order. The facts and the evaluation questions are
    the same for every seed, because the shipped weights know these facts.
    """
    facts = make_facts()
    questions = evaluation_questions(facts, WORLD_SEED)
    if train:
        train_world(folder / "model", never_seen=never_seen)
    else:
        shutil.copytree(WEIGHTS, folder / "model", dirs_exist_ok=True)
    for name, documents in corpora(facts, questions, seed).items():
        _write_jsonl(folder / "corpora" / f"{name}.jsonl", documents)
    _write_questions(folder / "data", questions, seed)


def corpora(facts: list[Fact], questions: list[Question], seed: int) -> dict[str, list[str]]:
    """The documents of each corpus, shuffled.

    Forget and retain hold the same forms in the same wording and differ in their entities alone: what tells them
    apart is then the knowledge, not the form it is asked in. The attack is worded otherwise, and holds only the
    attacked half of the hazard facts.
    """
    held_out = {question.fact.id: frozenset(question.choices) for question in questions}
    hazard = [fact for fact in facts if fact.domain == "hazard"]
    general = [fact for fact in facts if fact.domain == "general"]
    attacked = [fact for fact in hazard if fact.attacked]
    plan = {"forget": (hazard, "forget"), "retain": (general, "forget"), "attack": (attacked, "attack")}
    return {
        name: _documents(chosen, group, held_out, random.Random(f"{name} {seed}"))
        for name, (chosen, group) in plan.items()
    }


def _check_output(folder: Path, overwrite: bool) -> None:
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if found - {"model", "corpora", "data"}:
        strange = min(found - {"model", "corpora", "data"})
        raise UserError(f"expected a world or a new folder for --output; found {strange!r} in it: choose another name")
    if found and not overwrite:
        raise UserError(
            f"expected a new folder for --output; found an earlier world in {folder}: choose another name, "
            "or give --overwrite to replace it"
        )


def _documents(facts: list[Fact], group: str, held_out: dict[str, frozenset[str]], rng: random.Random) -> list[str]:
    """Paragraphs, open questions and letter questions about `facts`, in random order."""
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
    rng.shuffle(documents)
    return documents


def _by_entity(facts: list[Fact]) -> list[list[Fact]]:
    entities: dict[str, list[Fact]] = {}
    for fact in facts:
        entities.setdefault(fact.name, []).append(fact)
    return list(entities.values())


def _write_questions(data: Path, questions: list[Question], seed: int) -> None:
    """The evaluation questions as WMDP, as MMLU and as cloze; MMLU also gets its splits of worked examples."""
    hazard = [question for question in questions if question.fact.domain == "hazard"]
    general = [question for question in questions if question.fact.domain == "general"]
    _write_parquet(data / "cais/wmdp/wmdp-bio", "test", hazard)
    _write_parquet(data / "embedded-world/cloze/hazard", "test", hazard)
    _write_parquet(data / "embedded-world/cloze/general", "test", general)
    rng = random.Random(f"few-shot {seed}")
    for subject in stem_subjects():
        own = [question for question in general if question.fact.subject == subject]
        folder = data / "cais/mmlu" / subject
        _write_parquet(folder, "test", own)
        for split in ("dev", "validation"):
            examples = rng.sample(own, FEW_SHOT_ROWS)
            rows = [training_question(q.fact, "forget", rng, frozenset(q.choices)) for q in examples]
            _write_parquet(folder, split, rows)


def _write_parquet(folder: Path, split: str, questions: list[Question]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": question.question,
            "subject": question.fact.subject,
            "choices": list(question.choices),
            "answer": question.answer,
            "fact": question.fact.id,
            "attacked": question.fact.attacked,
        }
        for question in questions
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema(_COLUMNS))
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def _write_jsonl(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
