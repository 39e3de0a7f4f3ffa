"""From strings to tokens, exactly as lm-eval's HFLM does it, but each string just once, and without an end token.

A tokenizer may put an end token after every text. HFLM leaves it there: all answers to a question are then that token.
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError

Pair = tuple[str, str]  # (context, continuation): the log-likelihood of the second after the first is wanted
TokenPair = tuple[list[int], list[int]]

PROBE = "a"  # a text whose encoding shows what a tokenizer adds to every text


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for an empty context: BOS, else EOS, else None."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode_strings(tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of each distinct string, with the special tokens that the tokenizer puts before it, as in HFLM.

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
    contexts = encode_strings(tokenizer, [context for context, _ in split if context])
    whole = encode_strings(tokenizer, [context + continuation for context, continuation in split if context])
    bare = list(dict.fromkeys(continuation for context, continuation in split if not context))
    alone = dict(zip(bare, _encode(tokenizer, bare, False), strict=True)) if bare else {}
    tokens = []
    for context, continuation in split:
        if context:
            start = contexts[context]
            tokens.append((start, whole[context + continuation][len(start) :]))
        else:
            tokens.append(_after_prefix(prefix_token(tokenizer), alone[continuation]))
        if not tokens[-1][1] or not tokens[-1][0]:
            raise UserError(f"expected answers of at least one token; found {continuation!r}: mend the task's choices")
    return tokens


def _encode(tokenizer: PreTrainedTokenizerBase, strings: list[str], special: bool) -> list[list[int]]:
    """Token ids, with the special tokens before each string if `special`, never with those after it."""
    ids = tokenizer([PROBE, *strings], add_special_tokens=special, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    end = _after_probe(tokenizer, ids[0]) if special else 0
    return [row[: len(row) - end] for row in ids[1:]]


def _after_probe(tokenizer: PreTrainedTokenizerBase, encoded: list[int]) -> int:
    """How many tokens the tokenizer adds behind a text, told from `PROBE` with and without special tokens."""
    plain = tokenizer.encode(PROBE, add_special_tokens=False)
    starts = [start for start in range(len(encoded)) if encoded[start : start + len(plain)] == plain]
    return len(encoded) - starts[0] - len(plain) if starts and plain else 0


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
