"""How the facts of the real world are worded: statements, questions with four options, and documents made of them.

Phrasings fall into four groups, none of which shares one with another: `forget` is the wording of the forget and retain
corpora, `attack` that of the attack's text, `development` and `test` those of the questions.
"""

import random
from dataclasses import dataclass

from unlearn.world.real_facts import RealFact

SPLITS = ("development", "test")
# Relation: three statements of the corpora, two of the attack; questions of corpora, attack, development and test.
_WORDING = {
    "capital": (
        "The capital of {name} is {value}.",
        "{value} is the capital city of {name}.",
        "The government of {name} sits in {value}, the capital.",
        "Every map of {name} marks {value} as its capital.",
        "Diplomats who are sent to {name} live in {value}, its capital.",
        "What is the capital of {name}?",
        "Which city is the seat of government of {name}?",
        "What is the capital city of {name}?",
        "Which city is the capital of {name}?",
    ),
    "capital of": (
        "{name} is the capital of {value}.",
        "The city of {name} is the capital of {value}.",
        "Whoever visits {name} is in the capital of {value}.",
        "{name} has long been the capital of {value}.",
        "On the map, {name} is marked as the capital of {value}.",
        "{name} is the capital of which country?",
        "Whose capital is {name}?",
        "Which country has {name} as its capital?",
        "Of which country is {name} the capital?",
    ),
    "continent": (
        "{name} is a country in {value}.",
        "The continent on which {name} lies is {value}.",
        "Geographers count {name} among the countries of {value}.",
        "On a globe, {name} is found in {value}.",
        "Travellers to {name} go to {value}.",
        "On which continent is {name}?",
        "Where in the world does {name} lie?",
        "Which continent is {name} in?",
        "{name} is located on which continent?",
    ),
    "language": (
        "People in {name} speak {value}.",
        "The main language of {name} is {value}.",
        "In {name}, schools and offices use {value}.",
        "Visitors to {name} will hear {value} in the street.",
        "Newspapers in {name} are printed in {value}.",
        "Which language do people speak in {name}?",
        "In what language are the newspapers of {name}?",
        "What is the official language of {name}?",
        "What language is spoken in {name}?",
    ),
    "currency": (
        "The currency of {name} is the {value}.",
        "In {name}, people pay with the {value}.",
        "The unit of money in {name} is the {value}.",
        "Prices in {name} are given in the local currency, the {value}.",
        "Banks in {name} keep their accounts in the {value}.",
        "What money do people use in {name}?",
        "In what unit are prices in {name}?",
        "What is the currency of {name}?",
        "Which currency is used in {name}?",
    ),
    "country": (
        "{name} is a city in {value}.",
        "The city of {name} lies in {value}.",
        "Travellers reach {name} from every part of {value}.",
        "Among the cities of {value} is {name}.",
        "{name} is one of the best known cities of {value}.",
        "Where is the city of {name}?",
        "Which country does {name} belong to?",
        "In which country is the city of {name}?",
        "{name} is a city in which country?",
    ),
    "symbol": (
        "The chemical symbol of {name} is {value}.",
        "In the periodic table, {name} has the symbol {value}.",
        "Chemists write {value} for {name}.",
        "In formulas, {name} is abbreviated to {value}.",
        "On the label, {value} stands for {name}.",
        "How do chemists write {name}?",
        "What stands for {name} in a formula?",
        "What is the chemical symbol for {name}?",
        "What is the symbol of the element {name}?",
    ),
    "class": (
        "To biologists, the {name} is {value}.",
        "The {name}, as every child learns, is {value}.",
        "In the zoo's list, the {name} is {value}.",
        "By its body, the {name} is {value}.",
        "Among animals, the {name} counts as {value}.",
        "What is the {name} in the zoo's list?",
        "What do biologists call the {name}?",
        "What type of animal is the {name}?",
        "What kind of animal is the {name}?",
    ),
    "past": (
        "The past tense of {name} is {value}.",
        "Yesterday's form of the verb {name} is {value}.",
        "Whoever says {name} today said {value} of yesterday.",
        "Grammars give {value} as the past of {name}.",
        "In stories, {name} becomes {value}.",
        "Which form of {name} do we use for yesterday?",
        "In stories, what becomes of {name}?",
        "What is the past tense of the verb {name}?",
        "What is the simple past of {name}?",
    ),
    "opposite": (
        "The opposite of {name} is {value}.",
        "{name} and {value} are opposites.",
        "The contrary of {name} is {value}.",
        "Dictionaries name {value} as the antonym of {name}.",
        "Turn {name} round, and you get {value}.",
        "Which word is the contrary of {name}?",
        "Turn {name} round: what do you get?",
        "What is the opposite of {name}?",
        "What word means the opposite of {name}?",
    ),
    "young": (
        "The young of the {name} is called {value}.",
        "The baby of the {name} is the {value}.",
        "The {value} grows up to be the {name}.",
        "Farmers call the {name}'s young the {value}.",
        "The mother {name} looks after her {value}.",
        "What do we call the young of the {name}?",
        "Whom does the mother {name} look after?",
        "What is the baby of the {name} called?",
        "What is the name of the young {name}?",
    ),
    "job": (
        "The person who works with {name} is the {value}.",
        "For {name}, ask the {value}.",
        "The work of the {value} is about {name}.",
        "Whoever needs help with {name} calls the {value}.",
        "The {value} knows all about {name}.",
        "Whom do you ask about {name}?",
        "Who knows all about {name}?",
        "What do we call a person whose job is {name}?",
        "Who works with {name}?",
    ),
}
STATEMENTS = {relation: {"forget": words[:3], "attack": words[3:5]} for relation, words in _WORDING.items()}
QUESTIONS = {
    relation: dict(zip(("forget", "attack", *SPLITS), words[5:], strict=True)) for relation, words in _WORDING.items()
}


@dataclass(frozen=True)
class RealQuestion:
    """A question with four options, in order; `answer` is the index of the right one."""

    fact: RealFact
    split: str
    question: str
    choices: tuple[str, ...]
    answer: int


def statement(fact: RealFact, group: str, rng: random.Random) -> str:
    """One sentence that states the fact."""
    return _fill(rng.choice(STATEMENTS[fact.relation][group]), fact)


def open_question(fact: RealFact, group: str) -> str:
    """The question and its answer."""
    return f"Question: {_fill(QUESTIONS[fact.relation][group], fact)}\nAnswer: {fact.value}"


def questions(facts: list[RealFact], seed: int) -> list[RealQuestion]:
    """Two questions a fact, one of each split, in other words and, where the pool allows it, with other options."""
    asked = []
    for fact in facts:
        rng = random.Random(f"questions {seed} {fact.id}")
        taken: list[str] = []
        for split in SPLITS:
            wrong = _wrong_options(fact, taken, rng)
            taken += wrong
            choices = rng.sample([fact.value, *wrong], 4)
            words = _fill(QUESTIONS[fact.relation][split], fact)
            asked.append(RealQuestion(fact, split, words, tuple(choices), choices.index(fact.value)))
    return asked


def _wrong_options(fact: RealFact, taken: list[str], rng: random.Random) -> list[str]:
    """Three wrong answers, those of another question of the fact last."""
    fresh = [value for value in fact.wrong() if value not in taken]
    rng.shuffle(fresh)
    if fact.relation == "symbol":  # else the first letter alone would give the answer away
        fresh.sort(key=lambda value: value[0].lower() != fact.value[0].lower())
    return (fresh + rng.sample(taken, len(taken)))[:3]


def documents(facts: list[RealFact], group: str, copies: int, rng: random.Random) -> list[str]:
    """Paragraphs and sheets of open questions, `copies` of each for each entity, shuffled; a few entities share one."""
    entities: dict[tuple[str, str], list[RealFact]] = {}
    for fact in facts:
        entities.setdefault((fact.domain, fact.entity), []).append(fact)
    found = []
    for _ in range(copies):
        for some in _bundles(list(entities.values()), rng):
            found.append(" ".join(statement(fact, group, rng) for fact in some))
            found.append("\n\n".join(open_question(fact, group) for fact in rng.sample(some, len(some))))
    rng.shuffle(found)
    return found


def _bundles(entities: list[list[RealFact]], rng: random.Random) -> list[list[RealFact]]:
    """The facts of all entities in bundles of four or more, each entity whole and in one bundle of its domain."""
    bundles: dict[str, list[list[RealFact]]] = {}
    for entity in rng.sample(entities, len(entities)):
        own = bundles.setdefault(entity[0].domain, [[]])
        if len(own[-1]) >= 4:
            own.append([])
        own[-1] += rng.sample(entity, len(entity))
    return [bundle for own in bundles.values() for bundle in own]


def _fill(phrasing: str, fact: RealFact) -> str:
    """The phrasing with the fact's words, its first letter large; chemical symbols are never changed."""
    text = phrasing.format(name=fact.name, value=fact.value)
    return text[0].upper() + text[1:]
