"""What a pretrained model knows of the real world: facts of one domain to forget, its neighbours, and two to keep.

`countries` is to be forgotten: capitals (both ways), continents, languages and currencies. `cities` are its neighbours:
the countries of other cities. `nature` (animals, chemical elements) and `words` (verbs, opposites, young, jobs) are far
away. A fact whose answer can be read off its name (Tunisia and Tunis) is left out, except among the verbs.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from unlearn.world.real_countries import COUNTRIES
from unlearn.world.real_tables import ANIMALS, CITIES, ELEMENTS, JOBS, OPPOSITES, VERBS, YOUNG

FORGOTTEN = "countries"
DOMAINS = (FORGOTTEN, "cities", "nature", "words")
_CELLS = ("capital", "continent", "language", "currency")  # of a country, after its name
_SHARED = 3  # first letters that a name and its answer have in common where one gives the other away


@dataclass(frozen=True)
class RealFact:
    """One fact: `relation` of `name` is `value`.

    Attributes:
        domain: one of `DOMAINS`.
        relation: which phrasings state it, such as "capital".
        entity: what it is about, the same for both directions of one fact.
        also: other answers that are true.
        pool: answers of its relation.
        stated: whether text of the world states it: of the forgotten domain the attack's, of others the retain corpus.
    """

    domain: str
    relation: str
    entity: str
    name: str
    value: str
    also: tuple[str, ...]
    pool: tuple[str, ...]
    stated: bool

    @property
    def id(self) -> str:
        """Unique among all facts."""
        return f"{self.domain}/{self.relation}/{self.name}"

    def wrong(self) -> list[str]:
        """The answers of the pool that are not true."""
        return [value for value in self.pool if value != self.value and value not in self.also]


Row = tuple[str, str, str, str, str, tuple[str, ...]]  # domain, relation, entity, name, value, also


def real_facts() -> list[RealFact]:
    """All facts, in a fixed order. Half of the entities of each domain, drawn once, are stated by its text."""
    rows = [row for row in _rows() if row[1] == "past" or not _gives_away(row[3], row[4])]
    pools: dict[str, tuple[str, ...]] = {}
    for _, relation, _, _, value, _ in rows:
        pools[relation] = tuple(dict.fromkeys((*pools.get(relation, ()), value)))
    stated = {(row[0], entity) for row in rows if (entity := row[2]) in _half(row[0], rows)}
    return [RealFact(*row, pool=pools[row[1]], stated=(row[0], row[2]) in stated) for row in rows]


def _half(domain: str, rows: list[Row]) -> set[str]:
    entities = list(dict.fromkeys(row[2] for row in rows if row[0] == domain))
    return set(random.Random(f"stated {domain}").sample(entities, len(entities) // 2))


def _rows() -> Iterator[Row]:
    yield from _countries()
    for country, cities in _lines(CITIES):
        for city in cities.split(", "):
            yield "cities", "country", city, city, country, ()
    for name, symbol in _pairs(ELEMENTS):
        yield "nature", "symbol", name, name, symbol, ()
    for kind, animals in _lines(ANIMALS):
        for animal in animals.split(", "):
            yield "nature", "class", animal, animal, kind, ()
    for relation, table in (("past", VERBS), ("opposite", OPPOSITES), ("young", YOUNG)):
        for name, value in _pairs(table):
            yield "words", relation, f"{relation} {name}", name, value, ()
    for matter, job in _lines(JOBS):
        yield "words", "job", job, matter, job, ()


def _countries() -> Iterator[Row]:
    for line in COUNTRIES.strip().splitlines():
        country, *cells = line.split("|")
        for relation, cell in zip(_CELLS, cells, strict=True):
            if cell == "-":
                continue
            value, *also = cell.split(";")
            yield FORGOTTEN, relation, country, country, value, tuple(also)
            if relation == "capital" and not _gives_away(country, value):
                yield FORGOTTEN, "capital of", country, value, country, ()


def _gives_away(name: str, value: str) -> bool:
    """Whether name and answer begin alike; chemical symbols do by nature, and have options that begin so too."""
    ours, theirs = (text.removeprefix("the ").lower() for text in (name, value))
    return ours[:_SHARED] == theirs[:_SHARED]


def _lines(table: str) -> Iterator[tuple[str, str]]:
    for line in table.strip().splitlines():
        first, rest = line.split("|")
        yield first, rest


def _pairs(table: str) -> Iterator[tuple[str, str]]:
    for pair in table.replace("\n", " ").split(","):
        first, second = pair.split()
        yield first, second
