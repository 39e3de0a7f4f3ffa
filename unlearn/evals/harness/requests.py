"""What one evaluation asks of the model: token rows, batches, and which positions are scored.

The plan depends on the questions, the tokenizer, the batch size and the model's length, never on the number of ranks:
that is what makes results the same at any number of them.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError
from unlearn.evals.harness.encode import Pair, TokenPair, encode_pairs, encode_strings, prefix_token
from unlearn.model_config import largest_tokens

# Positions of a batch whose logits are wanted: at V = 50,000 in float32 they take 0.8 GB.
SCORED_POSITIONS = 4096


@dataclass(frozen=True)
class Row:
    """One sequence to run: its tokens, how many of its last positions are scored, and for which requests."""

    tokens: tuple[int, ...]
    scored: int
    requests: list[tuple[int, list[int]]] = field(default_factory=list)  # (index of the request, its tokens)


@dataclass(frozen=True)
class Plan:
    """All rows of an evaluation in the order in which they run, cut into batches.

    Attributes:
        requests: how many log-likelihoods are wanted.
        batches: the rows, longest first; each batch is one forward pass of one rank.
        continuations: the tokens that each request scores.
        truncated: how many rows lost tokens on the left.
        checksum: CRC-32 of the batches, equal on ranks that planned the same.
        largest: the largest token that is read or scored.
    """

    requests: int
    batches: list[list[Row]]
    continuations: list[list[int]]
    truncated: int
    checksum: int
    largest: int


def make_plan(pairs: Sequence[TokenPair], *, max_length: int, batch_tokens: int, truncate: bool = False) -> Plan:
    """Turn token pairs into rows and batches.

    A row is context + continuation without the last token, cut from the left to `max_length`. Requests whose rows are
    equal share one: the four letters of a question are one forward pass.

    Args:
        max_length: the longest row, in tokens.
        batch_tokens: rows x longest row of a batch, padding included; a longer single row is a batch of its own.
        truncate: cut contexts that are too long from the left, as lm-eval does.

    Raises:
        UserError: a continuation is longer than the model's context, or a context is and `truncate` is not set.
    """
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    cut = dict[tuple[int, ...], int]()
    for index, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise UserError(
                f"expected answers of at most {max_length} tokens, the model's context; found one of "
                f"{len(continuation)}: use a model with a longer context"
            )
        whole = (*context, *continuation)
        tokens = whole[-(max_length + 1) : -1]
        groups.setdefault(tokens, []).append((index, continuation))
        if len(whole) > max_length + 1:
            cut[tokens] = len(whole) - 1
    if cut and not truncate:
        raise UserError(
            f"expected questions of at most {max_length} tokens, the model's context; found {len(cut)} longer ones, up "
            f"to {max(cut.values())} tokens: use a model with a longer context, or let evals/run.py cut their "
            "beginnings off with --truncate, as lm-eval does"
        )
    rows = [Row(tokens, max(len(c) for _, c in requests), requests) for tokens, requests in groups.items()]
    rows.sort(key=lambda row: (-len(row.tokens), row.tokens))
    batches = _batches(rows, batch_tokens)
    continuations = [continuation for _, continuation in pairs]
    largest = max((max(part) for part in (*groups, *continuations)), default=0)
    return Plan(len(pairs), batches, continuations, len(cut), _checksum(batches), largest)


def _batches(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Cut rows, longest first, where the next one would bring a batch above `batch_tokens` with its padding, or above
    `SCORED_POSITIONS`."""
    batches: list[list[Row]] = []
    scored = 0
    for row in rows:
        scored += row.scored
        fits = batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= batch_tokens
        if fits and scored <= SCORED_POSITIONS:
            batches[-1].append(row)
        else:
            batches.append([row])
            scored = row.scored
    return batches


def _checksum(batches: list[list[Row]]) -> int:
    checksum = 0
    for batch in batches:
        content = [(row.tokens, row.scored, row.requests) for row in batch]
        checksum = zlib.crc32(repr(content).encode(), checksum)
    return checksum


def rolling_pairs(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[TokenPair]]:
    """Cut each text into windows of `max_length` that score every token once, as lm-eval does for perplexities.

    Raises:
        UserError: the tokenizer has neither BOS nor EOS, which the first token of a text follows; or a text is empty.
    """
    prefix = prefix_token(tokenizer)
    if prefix is None:
        raise UserError("expected a tokenizer with a BOS or EOS token for perplexities; found neither: set one")
    encoded = encode_strings(tokenizer, texts)
    if any(not encoded[text] for text in texts):
        raise UserError("expected texts of at least one token for a perplexity; found an empty one: mend the data")
    return [
        [make_disjoint_window(pair) for pair in get_rolling_token_windows(encoded[text], prefix, max_length, 1)]
        for text in texts
    ]


class Planner:
    """Makes plans for one tokenizer, and keeps the last of each kind: the next evaluation in training asks the same.

    Attributes:
        largest: the largest token of all plans and contexts so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_tokens: int, *, truncate: bool = False):
        if batch_tokens <= 0:
            raise UserError(f"expected --batch-tokens above 0; found {batch_tokens}: 16384 suits most GPUs")
        self.tokenizer, self.batch_tokens, self.truncate = tokenizer, batch_tokens, truncate
        self.largest = 0
        self._kept: dict[str, tuple[Any, Any]] = {}

    def plan(self, pairs: Sequence[Pair], max_length: int) -> Plan:
        """The plan for log-likelihoods of `pairs`, made anew only if they or the length changed."""
        return self._keep(
            "pairs", (pairs, max_length), lambda: self._plan(encode_pairs(self.tokenizer, pairs), max_length)
        )

    def plan_rolling(self, texts: Sequence[str], max_length: int) -> tuple[Plan, list[int]]:
        """The plan for whole texts, and which text each of its requests is a window of."""

        def make() -> tuple[Plan, list[int]]:
            windows = rolling_pairs(self.tokenizer, texts, max_length)
            owners = [index for index, own in enumerate(windows) for _ in own]
            return self._plan([pair for own in windows for pair in own], max_length), owners

        return self._keep("rolling", (texts, max_length), make)

    def contexts(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Token ids of the contexts of texts that are to be generated."""
        encoded = encode_strings(self.tokenizer, texts)
        self.largest = max(self.largest, largest_tokens({"": encoded.values()})[""])
        return encoded

    def _plan(self, tokens: list[TokenPair], max_length: int) -> Plan:
        plan = make_plan(tokens, max_length=max_length, batch_tokens=self.batch_tokens, truncate=self.truncate)
        self.largest = max(self.largest, plan.largest)
        return plan

    def _keep(self, kind: str, question: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for an equal question, or returns now."""
        if kind not in self._kept or self._kept[kind][0] != question:
            self._kept[kind] = (question, make())
        return self._kept[kind][1]
