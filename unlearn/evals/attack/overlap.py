"""Whether the text of an attack holds the very questions that it is measured by."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from unlearn.corpus import Corpus
from unlearn.evals.harness.question_task import QuestionTask

KEY = 5  # words; a shorter question is not looked for, as it may stand anywhere by chance
DECODED = 256  # windows at a time


def normalised(text: str) -> str:
    """Lower-case words and numbers with one space between: what is left of a text that was laid out differently."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def contained(questions: Iterable[str], texts: Iterable[str]) -> set[str]:
    """Those of `questions` that stand word for word in one of `texts`, whatever the case, spaces and punctuation."""
    index: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for question in questions:
        words = normalised(question)
        key = tuple(words.split()[:KEY])
        if len(key) == KEY:
            index.setdefault(key, []).append((question, f" {words} "))
    found: set[str] = set()
    for text in texts if index else ():
        plain = f" {normalised(text)} "
        parts = plain.split()
        keys = set(zip(*(parts[start:] for start in range(KEY)), strict=False)) & index.keys()
        found.update(question for key in keys for question, wanted in index[key] if wanted in plain)
    return found


def question_texts(tasks: Mapping[str, QuestionTask]) -> dict[str, list[str]]:
    """The text of every question by task: its column `question`, or else its prompt."""
    return {
        name: [str(document.get("question") or task.doc_to_text(document)) for document in task.eval_docs]
        for name, task in tasks.items()
    }


def overlap_warnings(
    questions: Mapping[str, Sequence[str]], corpora: Mapping[str, Corpus], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A sentence for each corpus that holds questions: how many of which task, and one of them.

    A question that is cut in two by the end of a window is not seen.

    Args:
        questions: of each task. corpora: by what they are called in the sentence; only their windows are looked at.
    """
    everything = list(dict.fromkeys(question for asked in questions.values() for question in asked))
    warnings = []
    for name, corpus in corpora.items():
        found = contained(everything, _decoded(corpus.windows, tokenizer))
        counts = {task: sum(question in found for question in asked) for task, asked in questions.items()}
        if found:
            example = next(question for question in everything if question in found)
            listed = ", ".join(
                f"{count} of {len(questions[task])} of {task}" for task, count in counts.items() if count
            )
            warnings.append(
                f"the {name} text of the attack holds questions that it is measured by, word for word ({listed}; e.g. "
                f"{_short(example)!r}): their answers may be learnt there and not recovered"
            )
    return warnings


def _decoded(windows: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for start in range(0, len(windows), DECODED):
        yield from tokenizer.batch_decode([window.tolist() for window in windows[start : start + DECODED]])


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
