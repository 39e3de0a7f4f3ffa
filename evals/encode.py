"""From strings to tokens, exactly as lm-eval's HFLM does it, but most strings just once."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError

Pair = tuple[str, str]  # (context, continuation): the log-likelihood of the second after the first is wanted
TokenPair = tuple[list[int], list[int]]

CHECKED = 8  # contexts of one ending whose continuation is encoded in full before the others' is taken to be the same


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
    contexts = encode_strings(tokenizer, [context for context, _ in split if context])
    tails = _continuations(tokenizer, [pair for pair in split if pair[0]], contexts)
    bare = list(dict.fromkeys(continuation for context, continuation in split if not context))
    alone = dict(zip(bare, _encode(tokenizer, bare, False), strict=True)) if bare else {}
    tokens = []
    for context, continuation in split:
        if context:
            tokens.append((contexts[context], tails[context, continuation]))
        else:
            tokens.append(_after_prefix(prefix_token(tokenizer), alone[continuation]))
        if not tokens[-1][1] or not tokens[-1][0]:
            raise UserError(f"expected answers of at least one token; found {continuation!r}: mend the task's choices")
    return tokens


def _continuations(
    tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], contexts: dict[str, list[int]]
) -> dict[Pair, list[int]]:
    """The tokens of each continuation after its context.

    Thousands of questions end in the same line ("Answer:") and are continued by the same four letters: encoding each
    question four times more takes most of the time. Where the first of them all give the same continuation, after the
    unchanged tokens of the context, so do the others: no tokenizer looks back across a whole line.
    """
    groups: dict[Pair, list[Pair]] = {}
    for context, continuation in dict.fromkeys(pairs):
        groups.setdefault((context.rpartition("\n")[2], continuation), []).append((context, continuation))
    tails: dict[Pair, list[int]] = {}
    rest = [pair for group in groups.values() if len(group) <= CHECKED for pair in group]
    for group in groups.values():
        if len(group) > CHECKED:
            tail = _common_tail(tokenizer, _spread(group), contexts)
            if tail is None:
                rest += group
            else:
                tails.update(dict.fromkeys(group, tail))
    whole = encode_strings(tokenizer, [context + more for context, more in rest])
    return tails | {pair: whole[pair[0] + pair[1]][len(contexts[pair[0]]) :] for pair in rest}


def _common_tail(
    tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], contexts: dict[str, list[int]]
) -> list[int] | None:
    """The tokens that follow the unchanged tokens of every context; None if they differ or a context's change."""
    whole = encode_strings(tokenizer, [context + more for context, more in pairs])
    tails = []
    for context, more in pairs:
        tokens, start = whole[context + more], contexts[context]
        if tokens[: len(start)] != start:
            return None
        tails.append(tokens[len(start) :])
    return tails[0] if all(tail == tails[0] for tail in tails) else None


def _spread(group: list[Pair]) -> list[Pair]:
    """`CHECKED` members of a larger group, evenly spread over it."""
    return [group[index * (len(group) - 1) // (CHECKED - 1)] for index in range(CHECKED)]


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
