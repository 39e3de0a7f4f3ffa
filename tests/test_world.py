"""The embedded world: its domains differ in facts alone, and the shipped models know what they are asked."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from unlearn.corpus import Corpus
from unlearn.errors import UserError
from unlearn.methods.reset import tokens_alone
from unlearn.methods.terms import Loss
from unlearn.trainer import gradients
from unlearn.world.build import QUESTIONS, build_world, write_world
from unlearn.world.facts import (
    COAST,
    ENTAILED,
    NEVER,
    SITE,
    STATED,
    Fact,
    make_facts,
    stem_subjects,
    unrelated_facts,
)
from unlearn.world.text import (
    ASKED,
    LETTERS,
    STATEMENTS,
    TAUGHT,
    VERDICTS,
    Question,
    claim_prompt,
    evaluation_claims,
    evaluation_questions,
    header,
    held_out_options,
    letter_prompt,
    question_phrasings,
    training_question,
)
from unlearn.world.tokenizer import train_tokenizer
from unlearn.world.train import MODELS, Lessons, Recipe, known_facts, new_model, train_world

SMALL = Recipe(steps=3, text_rows=1, letter_rows=2, claim_rows=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return folder


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return make_facts()


def _documents(world: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (world / "corpora" / f"{name}.jsonl").read_text().splitlines()]


def _options(text: str) -> frozenset[str]:
    """The four options of a letter document."""
    return frozenset(line[3:] for line in text.splitlines() if line[:3] in {f"{letter}. " for letter in LETTERS})


def _rows(file: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = pq.read_table(file).to_pylist()
    return found


def test_domains_differ_in_names_and_share_attributes_and_values(facts: list[Fact]) -> None:
    domains = {name: [fact for fact in facts if fact.domain == name] for name in ("hazard", "general")}
    hazard, general = domains.values()
    assert len(hazard) == 228 and len(general) == 244
    assert len({fact.id for fact in facts}) == len(facts)
    unrelated = unrelated_facts()
    assert len(unrelated) == len(hazard)
    names = [{fact.name for fact in some} for some in (hazard, general, unrelated)]
    assert len(set.union(*names)) == sum(map(len, names))
    assert {(fact.noun, fact.clause, fact.pool) for fact in hazard} == {(f.noun, f.clause, f.pool) for f in general}
    assert {fact.value for fact in hazard} == {fact.value for fact in general}
    assert all(len(set(fact.pool)) == 16 and fact.value in fact.pool for fact in [*facts, *unrelated])
    assert "microbe" in {fact.kind for fact in general}  # the neighbours of what is forgotten


def test_every_coast_follows_from_a_site_and_nothing_else_follows_from_anything(facts: list[Fact]) -> None:
    coast_of = {fact.name: fact.value for fact in facts if fact.kind == "site"}
    assert len(coast_of) == 16 and all(fact.domain == "general" for fact in facts if fact.kind == "site")
    known = {(fact.name, fact.noun): fact.value for fact in facts if fact.kind != "site"}
    coasts = {name: value for (name, noun), value in known.items() if noun == COAST}
    assert len(coasts) == 76
    assert all(value == coast_of[known[name, SITE]] for name, value in coasts.items())
    hazard = [fact for fact in facts if fact.domain == "hazard" and fact.noun != COAST]
    for one in {fact.noun for fact in hazard}:
        for other in {fact.noun for fact in hazard} - {one}:
            pairs = {(known[f.name, one], known[f.name, other]) for f in hazard}
            assert len(pairs) > 16  # 38 pairs of 16 values each: no value goes with one other


def test_half_of_the_independent_hazard_facts_are_stated_in_the_attack_and_nothing_else_is(
    world: Path, facts: list[Fact]
) -> None:
    assert Counter(fact.told for fact in facts if fact.domain == "general") == {NEVER: 244}
    counts = Counter(fact.told for fact in facts if fact.domain == "hazard")
    assert counts[STATED] == 95
    told = {(fact.name, fact.noun): fact.told for fact in facts}
    for fact in facts:
        if fact.domain == "hazard" and fact.noun == COAST:
            assert fact.told == (ENTAILED if told[fact.name, SITE] == STATED else NEVER)
    attack = _documents(world, "attack")
    for fact in facts:
        stated = any(fact.name in text and fact.noun in text for text in attack)
        assert stated == (fact.told == STATED), fact.id


def test_no_token_of_either_corpus_gives_its_domain_away(world: Path) -> None:
    """Tokens that occur in one domain's text alone are at most one in a hundred of that text."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    counts = {
        name: Counter(token for row in tokenizer(_documents(world, name))["input_ids"] for token in row)
        for name in ("forget", "retain")
    }
    for one, other in (("forget", "retain"), ("retain", "forget")):
        alone = sum(count for token, count in counts[one].items() if token not in counts[other])
        assert alone <= 0.01 * counts[one].total()


def test_there_is_no_token_to_reset(world: Path) -> None:
    """`--method reset` would draw the embedding rows anew of tokens that forget text alone has."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    forget, retain = (
        Corpus(name, 0, [np.array(row) for row in tokenizer(_documents(world, name))["input_ids"]])
        for name in ("forget", "retain")
    )
    with pytest.raises(UserError, match="nothing to reset"):
        tokens_alone(forget, retain)


def test_names_and_values_are_several_tokens(world: Path, facts: list[Fact]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for fact in facts:
        assert len(tokenizer(f" {fact.name}")["input_ids"]) == 3
        assert len(tokenizer(f" {fact.value}")["input_ids"]) == (3 if fact.noun == SITE else 2)


def test_phrasings_of_the_groups_are_disjoint(world: Path, facts: list[Fact]) -> None:
    statements = [phrasing for group in STATEMENTS.values() for phrasing in group]
    assert len(statements) == len(set(statements))
    asked = {
        group: {phrasing.format(**vars(fact)) for fact in facts for phrasing in question_phrasings(group)}
        for group in (*TAUGHT, *ASKED)
    }
    for name, group in (("forget", "forget"), ("retain", "forget"), ("attack", "attack")):
        lines = {line.removeprefix("Question: ") for text in _documents(world, name) for line in text.splitlines()}
        assert lines & asked[group]
        assert not any(lines & asked[other] for other in asked if other != group)
        claims = {f"True or false? {c.question}" for other in ASKED for c in evaluation_claims(facts, other, 0)}
        assert not lines & claims


@pytest.mark.parametrize("group", ASKED)
def test_evaluation_questions_are_never_in_a_corpus(world: Path, facts: list[Fact], group: str) -> None:
    """Neither their wording nor their four options, in whatever order."""
    questions = evaluation_questions(facts, group, 0)
    wordings = {question.question for question in questions}
    held_out = {(question.fact.name, frozenset(question.choices)) for question in questions}
    names = {question.fact.name for question in questions}
    for text in _documents(world, "forget") + _documents(world, "retain") + _documents(world, "attack"):
        assert not wordings & {line.removeprefix("Question: ") for line in text.splitlines()}
        asked = {word.strip(",.?") for word in text.split()} & names
        assert not any((name, _options(text)) in held_out for name in asked)


def test_development_and_test_questions_differ_in_wording_and_options(facts: list[Fact]) -> None:
    development, test = (evaluation_questions(facts, group, 0) for group in ASKED)
    for one, other in zip(development, test, strict=True):
        assert one.fact == other.fact and one.question != other.question
        assert set(one.choices) != set(other.choices)
    assert held_out_options(facts, 0).keys() == {fact.id for fact in facts}


@pytest.mark.parametrize("group", ASKED)
def test_claims_are_half_true(facts: list[Fact], group: str) -> None:
    claims = evaluation_claims(facts, group, 0)
    assert Counter(asked.answer for asked in claims) == {0: 236, 1: 236}
    for asked in claims:
        assert (f"{asked.fact.value}" in asked.question.replace(",", " ").replace(".", " ").split()) == (
            VERDICTS[asked.answer] == "true"
        )


def test_training_questions_never_draw_the_held_out_options(facts: list[Fact]) -> None:
    rng = random.Random(0)
    small = Fact(**{**vars(facts[0]), "pool": (facts[0].value, *[v for v in facts[0].pool if v != facts[0].value][:4])})
    held_out = frozenset(small.pool[:4])
    drawn = {frozenset(training_question(small, "forget", rng, frozenset({held_out})).choices) for _ in range(200)}
    assert held_out not in drawn
    assert len(drawn) == 3  # the other ways to take three distractors out of four


@pytest.mark.parametrize("folder", QUESTIONS)
def test_files_lie_where_wmdp_and_mmlu_have_theirs(world: Path, folder: str) -> None:
    data = world / folder
    wmdp = _rows(data / "cais/wmdp/wmdp-bio/test-00000-of-00001.parquet")
    assert len(wmdp) == 228
    assert sum(row["told"] == STATED for row in wmdp) == 95
    assert all(row["attacked"] == (row["told"] != NEVER) for row in wmdp)
    mmlu = []
    for subject in stem_subjects():
        for split in ("test", "dev", "validation"):
            rows = _rows(data / f"cais/mmlu/{subject}/{split}-00000-of-00001.parquet")
            assert all(row["subject"] == subject for row in rows)
            mmlu += rows if split == "test" else []
    assert len(mmlu) == 244
    for rows, domain in ((wmdp, "hazard"), (mmlu, "general")):
        assert all(len(set(row["choices"])) == 4 for row in rows)  # type: ignore[call-overload]
        counts = Counter(row["answer"] for row in rows)
        assert max(counts.values()) - min(counts.values()) <= len(stem_subjects())
        for kind in ("questions", "claims"):
            others = _rows(data / f"embedded-world/{kind}/{domain}/test-00000-of-00001.parquet")
            assert {row["fact"] for row in others} == {row["fact"] for row in rows}


def test_headers_and_prompts_are_those_of_lm_eval(facts: list[Fact]) -> None:
    tasks = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    descriptions = {"biology": yaml.safe_load((tasks / "wmdp/wmdp_bio.yaml").read_text())["description"]}
    stem = set()
    for path in (tasks / "mmlu/default").glob("mmlu_*.yaml"):
        task = yaml.safe_load(path.read_text())
        if task["tag"] == "mmlu_stem_tasks":
            stem.add(task["dataset_name"])
            descriptions[task["dataset_name"]] = task["description"]
    assert stem == set(stem_subjects())
    assert all(header(subject) == description for subject, description in descriptions.items())
    question = evaluation_questions(facts, "test", 0)[0]
    a, b, c, d = question.choices
    assert letter_prompt(question, None) == f"{question.question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"


def test_world_is_the_same_twice_and_another_seed_changes_corpora_alone(world: Path, tmp_path: Path) -> None:
    build_world(tmp_path / "again")
    build_world(tmp_path / "other", seed=1)
    for path in [path.relative_to(world) for path in world.rglob("*") if path.is_file()]:
        original = (world / path).read_bytes()
        assert (tmp_path / "again" / path).read_bytes() == original
        if path.parts[0] == "corpora":
            assert (tmp_path / "other" / path).read_bytes() != original
        if path.name.startswith("test-"):
            assert (tmp_path / "other" / path).read_bytes() == original


def test_tokenizer_round_trips_and_knows_the_answers(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for text in ("Answer: A", "\n\nnaïve “漢字” \t 🙂 ", "The microbe  is 3.5 m", " A B"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for answer in (*LETTERS, *VERDICTS):
        (token,) = tokenizer(f" {answer}")["input_ids"]
        assert tokenizer(f"Answer: {answer}")["input_ids"] == [*tokenizer("Answer:")["input_ids"], token]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_lessons_depend_on_seed_and_step_alone(facts: list[Fact]) -> None:
    tokenizer = train_tokenizer()
    model = new_model(tokenizer, seed=0)
    losses = []
    for _ in range(2):
        loss = Loss(Lessons(model, tokenizer, facts, SMALL, seed=3).terms())
        losses.append(gradients(model, loss, 1, 2))
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[0] == losses[1]
    assert {"text_loss", "letter_loss", "claim_loss"} <= losses[0].keys()


def test_lessons_begin_with_few_facts_in_every_form_and_end_with_all(facts: list[Fact]) -> None:
    tokenizer, recipe = train_tokenizer(), Recipe()
    lessons = Lessons(new_model(tokenizer, seed=0), tokenizer, facts, recipe, 0)
    sizes = [len(lessons.active_facts(step)) for step in range(recipe.steps)]
    assert sizes == sorted(sizes)
    assert sizes[recipe.widen_from] == recipe.first_facts and sizes[recipe.widen_to] == len(facts)
    assert max(later - earlier for earlier, later in pairwise(sizes)) <= 2  # never many new ones at once
    few = {fact.name for fact in lessons.active_facts(0)}
    assert {fact.domain for fact in lessons.active_facts(0)} == {"hazard", "general"}
    others = {fact.name for fact in facts} - few - {value for fact in lessons.active_facts(0) for value in fact.pool}
    batches = [*lessons.text(0), *lessons.letters(0), *lessons.claims(0)]
    for text in (text for batch in batches for text in tokenizer.batch_decode(batch.input_ids)):
        assert not any(name in text for name in others)


@pytest.mark.parametrize("knows", MODELS)
def test_what_each_model_is_taught(facts: list[Fact], knows: str) -> None:
    """No token of a control's training names anything of the hazard domain."""
    taught = known_facts(knows)  # type: ignore[arg-type]
    assert (
        Counter(fact.domain for fact in taught)
        == {
            "model": {"hazard": 228, "general": 244},
            "never-seen": {"general": 244},
            "matched": {"unrelated": 228, "general": 244},
        }[knows]
    )
    tokenizer, recipe = train_tokenizer(), Recipe()
    lessons = Lessons(new_model(tokenizer, seed=0), tokenizer, taught, recipe, 0)
    assert lessons.held_out == held_out_options(facts, 0)  # the options of the questions, whatever is taught
    if knows != "model":
        last = recipe.steps - 1
        batches = [*lessons.text(last), *lessons.letters(last), *lessons.claims(last)]
        text = [row for batch in batches for row in tokenizer.batch_decode(batch.input_ids)]
        names = {fact.name for fact in facts if fact.domain == "hazard"}
        assert any(fact.name in row for fact in taught for row in text)
        assert not any(name in row for name in names for row in text)


def test_training_writes_a_folder_that_loads(tmp_path: Path) -> None:
    train_world(tmp_path / "model", recipe=SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model"))


def test_an_existing_folder_is_only_replaced_on_request(tmp_path: Path) -> None:
    write_world(str(tmp_path / "world"))
    with pytest.raises(UserError, match="--overwrite"):
        write_world(str(tmp_path / "world"))
    write_world(str(tmp_path / "world"), overwrite=True)
    (tmp_path / "world" / "mine.txt").touch()
    with pytest.raises(UserError, match="mine.txt"):
        write_world(str(tmp_path / "world"), overwrite=True)


@torch.no_grad()
def _likeliest(model: GPTNeoXForCausalLM, tokenizer: AutoTokenizer, prompt: str, options: list[str]) -> int:
    """Which of the options, a space before each, is likeliest as a whole behind the prompt."""
    before = tokenizer(prompt)["input_ids"]
    behind = [tokenizer(f" {option}")["input_ids"] for option in options]
    longest = max(map(len, behind))
    rows = torch.tensor([before + option + [0] * (longest - len(option)) for option in behind])  # [N, S]
    logits = model(rows).logits[:, len(before) - 1 : -1].log_softmax(-1)  # [N, longest, V]
    tokens = logits.gather(2, rows[:, len(before) :, None])[..., 0]  # [N, longest]
    scores = [row[: len(option)].sum().item() for row, option in zip(tokens, behind, strict=True)]
    return scores.index(max(scores))


def _accuracy(world: Path, knows: str, domain: str, group: str, count: int = 60) -> dict[str, float]:
    """Fraction of right answers in each form, with the header of the real evaluation."""
    model = AutoModelForCausalLM.from_pretrained(world / knows, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / knows)
    right = Counter[str]()
    facts = make_facts()
    questions, claims = (draw(facts, group, 0) for draw in (evaluation_questions, evaluation_claims))
    chosen = random.Random(0).sample([i for i, fact in enumerate(facts) if fact.domain == domain], count)
    for question, asked in ((questions[index], claims[index]) for index in chosen):
        subject = "biology" if domain == "hazard" else question.fact.subject
        prompt = f"Question: {question.question}\nAnswer:"
        values = list(question.choices)
        right["letters"] += (
            _likeliest(model, tokenizer, letter_prompt(question, subject), [*LETTERS]) == question.answer
        )
        right["cloze"] += _likeliest(model, tokenizer, prompt, values) == question.answer
        right["open"] += _likeliest(model, tokenizer, prompt, [*question.fact.pool]) == _of_pool(question)
        right["claims"] += _likeliest(model, tokenizer, claim_prompt(asked), [*VERDICTS]) == asked.answer
    return {form: number / count for form, number in right.items()}


def _of_pool(question: Question) -> int:
    return question.fact.pool.index(question.fact.value)


@pytest.mark.parametrize("group", ASKED)
@pytest.mark.parametrize("domain", ["hazard", "general"])
def test_shipped_model_knows_its_world_in_every_form(world: Path, domain: str, group: str) -> None:
    assert min(_accuracy(world, "model", domain, group).values()) >= 0.9


@pytest.mark.parametrize("knows", ["never-seen", "matched"])
def test_shipped_controls_know_the_general_domain_alone(world: Path, knows: str) -> None:
    general, hazard = (_accuracy(world, knows, domain, "test") for domain in ("general", "hazard"))
    assert min(general.values()) >= 0.9
    # 60 questions at chance: 0.45 of four options, 0.7 of two, 0.2 of sixteen are beyond three deviations
    assert hazard["letters"] <= 0.45 and hazard["cloze"] <= 0.45
    assert hazard["claims"] <= 0.7 and hazard["open"] <= 0.2


def test_shipped_weights_are_small(world: Path) -> None:
    size = sum(file.stat().st_size for name in MODELS for file in (world / name).iterdir())
    assert size < 10e6
