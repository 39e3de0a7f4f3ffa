"""What one evaluation asks of the model: token rows, batches, and which positions are scored.

The plan depends on the questions, the tokenizer, the batch size and the model's length, never on the number of ranks:
that is what makes results the same at any number of them.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError

Pair = tuple[str, str]  # (context, continuation): the log-likelihood of the second after the first is wanted
TokenPair = tuple[list[int], list[int]]


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for an empty context: BOS, else EOS, else None."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode_strings(tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of each distinct string, with the tokenizer's own special tokens, as lm-eval's HFLM encodes them.

    A string that already starts with the prefix token's text gets no special tokens, or BOS would stand there twice.
    """
    distinct = list(dict.fromkeys(strings))
    prefix = prefix_token(tokenizer)
    start = str(tokenizer.decode([prefix])) if prefix is not None else None
    encoded: dict[str, list[int]] = {}
    for special in (True, False):
        group = [string for string in distinct if (start is None or not string.startswith(start)) == special]
        if group:
            encoded.update(zip(group, _encode(tokenizer, group, special), strict=True))
    return encoded


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[TokenPair]:
    """Split each (context, continuation) into tokens exactly as lm-eval's `TemplateLM` does.

    Spaces at the end of a context belong to the continuation. The two are encoded together, and the continuation is
    what is longer than the context alone. An empty context becomes the prefix token.

    Raises:
        UserError: a continuation without tokens, or an empty context where the tokenizer has neither BOS nor EOS.
    """
    split = [_move_spaces(context, continuation) for context, continuation in pairs]
    with_context = [pair for pair in split if pair[0]]
    encoded = encode_strings(tokenizer, [text for pair in with_context for text in (pair[0], pair[0] + pair[1])])
    bare = list(dict.fromkeys(continuation for context, continuation in split if not context))
    alone = dict(zip(bare, _encode(tokenizer, bare, False), strict=True)) if bare else {}
    tokens = []
    for context, continuation in split:
        if context:
            start = encoded[context]
            tokens.append((start, encoded[context + continuation][len(start) :]))
        else:
            tokens.append(_after_prefix(prefix_token(tokenizer), alone[continuation]))
        if not tokens[-1][1] or not tokens[-1][0]:
            raise UserError(f"expected answers of at least one token; found {continuation!r}: mend the task's choices")
    return tokens


def _encode(tokenizer: PreTrainedTokenizerBase, strings: list[str], special: bool) -> list[list[int]]:
    return tokenizer(strings, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _move_spaces(context: str, continuation: str) -> Pair:
    stripped = context.rstrip()
    if not stripped:  # nothing but spaces: lm-eval would encode an empty context here, without a prefix token
        return "", context + continuation
    return stripped, context[len(stripped) :] + continuation


def _after_prefix(prefix: int | None, continuation: list[int]) -> TokenPair:
    if prefix is None:
        raise UserError("expected a tokenizer with a BOS or EOS token for empty contexts; found neither: set one")
    if continuation[:1] == [prefix]:
        return continuation[:1], continuation[1:]
    return [prefix], continuation


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
        truncated: how many rows lost tokens on the left.
        checksum: CRC-32 of the batches, equal on ranks that planned the same.
    """

    requests: int
    batches: list[list[Row]]
    truncated: int
    checksum: int


def make_plan(pairs: Sequence[TokenPair], *, max_length: int, batch_tokens: int) -> Plan:
    """Turn token pairs into rows and batches.

    A row is context + continuation without the last token, cut from the left to `max_length`. Requests whose rows are
    equal share one: the four letters of a question are one forward pass.

    Args:
        max_length: the longest row, in tokens.
        batch_tokens: rows x longest row of a batch, padding included; a longer single row is a batch of its own.

    Raises:
        UserError: a continuation is longer than the model's context.
    """
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    cut = set()
    for index, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise UserError(
                f"expected answers of at most {max_length} tokens, the model's context; found one of "
                f"{len(continuation)}: use a model with a longer context"
            )
        whole = tuple(context + continuation)
        tokens = whole[-(max_length + 1) :][:-1]
        groups.setdefault(tokens, []).append((index, continuation))
        if len(whole) > max_length + 1:
            cut.add(tokens)
    rows = [Row(tokens, max(len(c) for _, c in requests), requests) for tokens, requests in groups.items()]
    rows.sort(key=lambda row: (-len(row.tokens), row.tokens))
    batches = _batches(rows, batch_tokens)
    return Plan(len(pairs), batches, len(cut), _checksum(batches))


def _batches(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Cut rows, longest first, where the next one would bring a batch above `batch_tokens` with its padding."""
    batches: list[list[Row]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _checksum(batches: list[list[Row]]) -> int:
    checksum = 0
    for batch in batches:
        content = [(row.tokens, row.scored, row.requests) for row in batch]
        checksum = zlib.crc32(repr(content).encode(), checksum)
    return checksum


class Planner:
    """Makes plans for one tokenizer, and keeps the last: the next evaluation in a training run asks the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_tokens: int):
        if batch_tokens <= 0:
            raise UserError(f"expected --batch-tokens above 0; found {batch_tokens}: 16384 suits most GPUs")
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self._last: tuple[list[Pair], int, Plan] | None = None

    def plan(self, pairs: list[Pair], max_length: int) -> Plan:
        """The plan for `pairs`, made anew only if they or the length changed."""
        if self._last is None or self._last[:2] != (pairs, max_length):
            tokens = encode_pairs(self.tokenizer, pairs)
            plan = make_plan(tokens, max_length=max_length, batch_tokens=self.batch_tokens)
            self._last = (pairs, max_length, plan)
        return self._last[2]
