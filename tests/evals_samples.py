"""Samples as lm-eval logs them, made by hand, for the tests of the statistics."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from unlearn.evals.judge.answers import Answers, Key, Letters, collect
from unlearn.evals.judge.summary import summarise

ABCD = Letters(("A", "B", "C", "D"))
HASHED = ("doc", "prompt", "target")


def sample(likelihoods: Sequence[float], target: int, name: str = "", **doc: object) -> dict[str, Any]:
    """One question with letters; `name` makes it different from others."""
    right = float(likelihoods.index(max(likelihoods)) == target)
    return {
        "doc": doc,
        **{f"{of}_hash": hashlib.sha256(f"{of} {name} {doc} {target}".encode()).hexdigest() for of in HASHED},
        "target": target,
        "acc": right,
        "metrics": ["acc"],
        "filter": "none",
        "filtered_resps": [(value, False) for value in likelihoods],
        "arguments": [("question", f" {'ABCD'[place]}") for place in range(len(likelihoods))],
    }


def answering(answers: Sequence[int], targets: Sequence[int], hidden: float = 0.0) -> list[dict[str, Any]]:
    """Questions to which a model says `answers`; `hidden` is what the right letter has more than the other silent ones.

    Deterministic: the log-likelihoods of the letters that were not said differ a little from question to question.
    """
    rng = random.Random(0)
    samples = []
    for number, (answer, target) in enumerate(zip(answers, targets, strict=True)):
        row = [rng.uniform(-0.1, 0.1) for _ in range(4)]
        row[target] += hidden
        row[answer] += 5.0
        samples.append(sample(row, target, str(number)))
    return samples


def keys_of(samples: list[dict[str, Any]]) -> list[Key]:
    """What marks each sample: its continuations without their space, and its target as a place or as a text."""
    keys = []
    for one in samples:
        texts = tuple(continuation.removeprefix(" ") for _, continuation in one["arguments"])
        targets = one["target"] if isinstance(one["target"], list) else [one["target"]]
        keys.append(Key(texts, tuple(texts.index(right) if isinstance(right, str) else right for right in targets)))
    return keys


def gather(samples: list[dict[str, Any]], letters: Letters | None = ABCD) -> Answers:
    """`collect`, for tasks that have an accuracy."""
    found = collect(samples, samples[0]["metrics"][0], letters=letters, keys=keys_of(samples))
    assert found is not None
    return found


def summary_of(samples: list[dict[str, Any]], letters: Letters | None = ABCD) -> dict[str, Any]:
    """The numbers of one task."""
    return summarise({"samples": {"task": samples}, "answers": {"task": gather(samples, letters)}})["task"]
