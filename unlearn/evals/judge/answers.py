"""What a model answered, question by question, condensed from lm-eval's samples: the raw material of all statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlearn.evals.judge.stats import permuted_matches, permuted_scores
from unlearn.seeding import derive

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "exact_match")  # of lm-eval's metrics those taken unless another is named
SMALL = 20  # questions of a task, below which they tell nothing about letters
Sample = dict[str, Any]


@dataclass(frozen=True)
class Letters:
    """The names of the choices where they stand in the prompt, and which orders of the choices were asked.

    Attributes:
        names: e.g. A, B, C, D, at place 0, 1, 2, 3.
        orders: how many cyclic orders of its choices each question was asked in; consecutive samples are one question.
    """

    names: tuple[str, ...]
    orders: int = 1


class Key(NamedTuple):
    """What a question with choices is marked by.

    Attributes:
        texts: of the choices, whose lengths `acc_norm` and `acc_bytes` divide by.
        right: the places of the right ones.
    """

    texts: tuple[str, ...]
    right: tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """The answers to one task, which is one stratum. All lists have one entry a sample.

    A sample is a question, or one order of its choices where several were asked.

    Attributes:
        metric: which of lm-eval's metrics says what is right.
        ids: 16 hexadecimal digits of the question's SHA-256, which two models' answers are paired by.
        prompts: 8 digits of the prompt's and 8 of the right answer's: how the question was asked.
        right: the metric's value, 0 or 1, or a share between them where a task gives partial credit.
        letters: the names of the choices, empty where the choices are not letters shown in the prompt.
        orders: cyclic orders of each question, 1 without `--permute-choices`.
        answers, targets: the place of the given and of the right choice; empty for tasks without choices, with several
            right ones, or whose metric does not ask for the likeliest.
        likelihoods: the log-likelihood of each letter; empty without letters.
        debiased: the place answered once each letter lost its mean log-likelihood over the task (see `debias_small`);
            empty without letters.
        ties: whether two choices shared the highest log-likelihood.
        probability: of the right choice, among the choices; empty for tasks without choices.
        answer_probability: of the right answer's text, length-normalised: P(answer)^(1/tokens); empty with letters.
        cyclic: one entry a *question*: whether the choice with the highest mean log-likelihood over all orders is
            right, in which every letter's habit cancels (Zheng et al. 2024, https://arxiv.org/abs/2309.03882); empty
            where just one order was asked.
    """

    metric: str
    ids: list[str]
    prompts: list[str]
    right: list[float]
    letters: list[str]
    orders: int
    answers: list[int]
    targets: list[int]
    likelihoods: list[list[float]]
    debiased: list[int]
    ties: list[bool]
    probability: list[float]
    answer_probability: list[float]
    cyclic: list[int]

    @property
    def small(self) -> bool:
        """Whether these are too few questions to tell anything about letters by themselves."""
        return len(self.right) < SMALL * self.orders

    def subset(self, indices: Sequence[int]) -> "Answers":
        """The same for some samples; the debiased answers stay those over the whole task."""
        chosen = {
            field.name: [value[index] for index in indices] if (value := getattr(self, field.name)) else []
            for field in fields(self)
            if field.name not in ("metric", "letters", "orders", "cyclic")
        }
        questions = sorted({index // self.orders for index in indices})
        cyclic = [self.cyclic[question] for question in questions] if self.cyclic else []
        return Answers(metric=self.metric, letters=self.letters, orders=self.orders, cyclic=cyclic, **chosen)

    def shares_right(self) -> list[float]:
        """What each question earned, as the mean over its orders."""
        return np.asarray(self.right, dtype=float).reshape(-1, self.orders).mean(axis=1).tolist()

    def shuffled_matches(self) -> NDArray[np.int64]:
        """How many answers would be right with the right answers shuffled among the questions: int64 [draws].

        The seed is made of the questions: with one seed for all subjects the sum over a group would vary too much.
        """
        seed = derive("shuffled answers", *self.ids)
        if self.orders == 1:
            return permuted_matches(self.answers, self.targets, seed=seed)
        places, orders = np.asarray(self.answers).reshape(-1, self.orders), np.arange(self.orders)
        choices = (places + orders) % len(self.letters)  # [questions, orders], as places of the first order
        table = (choices[:, :, None] == np.arange(len(self.letters))).sum(axis=1)
        return permuted_scores(table, self.targets[:: self.orders], seed=seed)

    def record(self) -> dict[str, Any]:
        """What a results file keeps, for pairing with another model's answers."""
        kept = ("metric", "ids", "prompts", "right", "letters", "orders", "answers", "targets", "debiased")
        return {name: getattr(self, name) for name in kept}


def collect(
    samples: Sequence[Sample],
    metric: str,
    *,
    letters: Letters | None = None,
    keys: Sequence[Key] = (),
    tokens: Mapping[tuple[str, str], int] | None = None,
) -> Answers | None:
    """Condense lm-eval's samples of one task.

    Args:
        metric: of lm-eval, whose mean over the questions is reported.
        letters: for tasks whose choices are letters in the prompt.
        keys: one a sample, for tasks with choices.
        tokens: how many tokens the continuation of each (context, continuation) has.

    Returns:
        None if the metric is not a number from 0 to 1 for each question.
    """
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    right = _earned(first, metric)
    if right is None:
        return None
    ids = [sample["doc_hash"][:16] for sample in first]
    prompts = [prompt_id(sample["prompt_hash"], sample["target_hash"]) for sample in first]
    empty: dict[str, list[Any]] = {
        name: []
        for name in (
            *("letters", "answers", "targets", "likelihoods", "debiased"),
            *("ties", "probability", "answer_probability", "cyclic"),
        )
    }
    if keys and all(len(key.right) == 1 and len(key.texts) > 1 for key in keys):
        rows = [_likelihoods(sample, len(key.texts)) for sample, key in zip(first, keys, strict=True)]
        scores = [_scores(sample, key, metric) for sample, key in zip(first, keys, strict=True)]
        targets = [key.right[0] for key in keys]
        # A task may mark by rules of its own: then the likeliest choice is not its answer.
        if right == [float(_likeliest(row) == target) for row, target in zip(scores, targets, strict=True)]:
            empty |= _of_choices(first, targets, rows, scores, letters, tokens)
    orders = letters.orders if letters else 1
    return Answers(metric=metric, ids=ids, prompts=prompts, right=right, orders=orders, **empty)


def merged(parts: Sequence[Answers]) -> Answers:
    """The answers to several tasks of one kind as those to one."""
    names = {field.name for field in fields(Answers)} - {"metric", "letters", "orders"}
    lists: dict[str, Any] = {name: [value for part in parts for value in getattr(part, name)] for name in names}
    return replace(parts[0], **lists)


def debias_small(found: Mapping[str, Answers]) -> dict[str, Answers]:
    """The same answers, with tasks of fewer than `SMALL` questions debiased by the letters' means over all of these.

    The mean over a few questions is mostly their right answers, and takes them away: of a model that knows everything,
    one question a subject would leave 25 %.
    """
    together: dict[tuple[str, ...], list[str]] = {}
    for name, answers in found.items():
        if answers.letters and answers.small:
            together.setdefault(tuple(answers.letters), []).append(name)
    pooled = dict(found)
    for names in together.values():
        debiased = iter(_debiased([row for name in names for row in found[name].likelihoods]))
        pooled |= {name: replace(found[name], debiased=[next(debiased) for _ in found[name].right]) for name in names}
    return pooled


def prompt_id(prompt_hash: str, target_hash: str) -> str:
    """What tells how a question was asked, and what counts as right: of the SHA-256 of both."""
    return prompt_hash[:8] + target_hash[:8]


def _earned(samples: Sequence[Sample], metric: str) -> list[float] | None:
    """The metric's value of each sample, whole numbers as such; None unless all are numbers from 0 to 1."""
    values = [sample.get(metric) for sample in samples]
    if not all(isinstance(value, (int, float, np.number, np.bool_)) and 0 <= value <= 1 for value in values):
        return None
    return [int(value) if value in (0, 1) else float(value) for value in values if value is not None]


def _likelihoods(sample: Sample, choices: int) -> list[float]:
    """The log-likelihood of each choice; those without a context may stand behind them."""
    return [response[0] for response in sample["filtered_resps"][:choices]]


def _scores(sample: Sample, key: Key, metric: str) -> list[float]:
    """What the metric compares: log-likelihoods, by character or byte of the choice, or above those without context."""
    row, choices = _likelihoods(sample, len(key.texts)), len(key.texts)
    if metric == "acc_mutual_info":
        alone = [response[0] for response in sample["filtered_resps"][choices:]]
        return [value - other for value, other in zip(row, alone, strict=True)]
    lengths = {"acc_norm": map(len, key.texts), "acc_bytes": (len(text.encode()) for text in key.texts)}
    return [value / length for value, length in zip(row, lengths.get(metric, [1] * choices), strict=True)]


def _of_choices(
    samples: Sequence[Sample],
    targets: list[int],
    rows: list[list[float]],
    scores: list[list[float]],
    letters: Letters | None,
    tokens: Mapping[tuple[str, str], int] | None,
) -> dict[str, list[Any]]:
    """The fields of `Answers` that only tasks with choices have."""
    found: dict[str, list[Any]] = {
        "answers": [_likeliest(row) for row in scores],
        "targets": targets,
        "ties": [row.count(max(row)) > 1 for row in scores],
        "probability": [_share(row, target) for row, target in zip(rows, targets, strict=True)],
    }
    if letters is not None:
        found |= {"letters": list(letters.names), "likelihoods": rows, "debiased": _debiased(rows)}
        if letters.orders > 1:
            found["cyclic"] = _cyclic(rows, targets, letters.orders)
    elif tokens is not None:
        found["answer_probability"] = [
            float(np.exp(row[target] / tokens[tuple(sample["arguments"][target])]))
            for sample, row, target in zip(samples, rows, targets, strict=True)
        ]
    return found


def _likeliest(row: list[float]) -> int:
    """The place of the highest value; the first among equals, as lm-eval counts it."""
    return row.index(max(row))


def _share(row: list[float], place: int) -> float:
    """The probability of one choice among all of them."""
    weights = np.exp(np.asarray(row) - max(row))
    return float(weights[place] / weights.sum())


def _debiased(rows: list[list[float]]) -> list[int]:
    """The likeliest place of each row once every place has lost its mean log-likelihood over all rows."""
    table = np.asarray(rows)
    return (table - table.mean(axis=0)).argmax(axis=1).tolist()


def _cyclic(rows: list[list[float]], targets: list[int], orders: int) -> list[int]:
    """Whether the choice with the highest mean over the cyclic orders is right, for each question.

    In order s, place j holds choice (j + s) mod k of the first order.
    """
    right = []
    for first in range(0, len(rows), orders):
        block = [np.roll(rows[first + shift], shift) for shift in range(orders)]  # by choice, no longer by place
        right.append(int(np.mean(block, axis=0).argmax() == targets[first]))
    return right
