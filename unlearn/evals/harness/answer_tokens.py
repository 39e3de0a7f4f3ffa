"""Are the answers to a question what the task wrote, once they are tokens?"""

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError
from unlearn.evals.harness.encode import Pair

Scored = Mapping[Pair, Sequence[int]]  # (context, continuation) -> the tokens of the continuation


def check_answer_tokens(
    task: str, questions: Iterable[Sequence[Pair]], scored: Scored, tokenizer: PreTrainedTokenizerBase, *, letters: bool
) -> None:
    """Raise `UserError` unless the choices of each question can be told apart by the tokens that are scored.

    A tokenizer may cut answers off, normalise them away or replace them by an unknown token: every model then scores
    chance, or always says the same letter.

    Args:
        questions: the (context, continuation) of each choice.
        letters: the choices are letters; these must be one token each, apart from what all of them start with.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # part of an answer may be unknown
    for number, pairs in enumerate(questions):
        for pair in pairs:
            strange = [
                token for token in scored[pair] if token in special and _text(tokenizer, token) not in "".join(pair)
            ]
            if strange:
                raise UserError(
                    f"expected {pair[1]!r} in question {number} of task {task} to be tokens of what it says; found the "
                    f"special token {_text(tokenizer, strange[0])!r}: use a model with another tokenizer"
                )
        if letters:
            _check_letters(task, pairs, scored)
        _check_differ(task, number, pairs, scored)


def _check_differ(task: str, number: int, pairs: Sequence[Pair], scored: Scored) -> None:
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    for context, continuation in pairs:
        other = seen.setdefault((context, tuple(scored[context, continuation])), continuation)
        if other != continuation:
            raise UserError(
                f"expected the choices of question {number} of task {task} to differ in their tokens; found the same "
                f"for {other!r} and {continuation!r}: use a model with another tokenizer, or mend the task's choices"
            )


def _check_letters(task: str, pairs: Sequence[Pair], scored: Scored) -> None:
    """One token a letter, as all published numbers take it to be. A context's last spaces may stand before each."""
    start = scored[pairs[0]][:-1]
    for pair in pairs:
        tokens = scored[pair]
        if tokens[:-1] == start and (not start or pair[0] != pair[0].rstrip()):
            continue
        raise UserError(
            f"expected each answer letter of task {task} to be one token of the tokenizer; found {len(tokens)} for "
            f"{pair[1]!r}: the letters' probabilities would mean something else, choose a model with another tokenizer "
            "or a task with full answers"
        )


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
