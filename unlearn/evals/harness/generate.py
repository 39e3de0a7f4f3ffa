"""Greedy generation for lm-eval's `generate_until`, in lock-step on every rank.

Shapes: B rows, S tokens of the longest context. Contexts are padded on the left, and keys and values are kept from one
step to the next. Ranks that have nothing to write, or have finished, take part until the last one has: a sharded model
needs every rank in every forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError

_GREEDY = {"do_sample": False, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}
_IGNORED = ("until", "max_gen_toks", "top_k")  # the first two are read below; the last has no effect on the likeliest

Step = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Writing:
    """One text to write.

    Attributes:
        index: of its request.
        tokens: the context, cut from the left so that `longest` more fit.
        longest: most tokens to write.
        until: strings at the first of which the text ends; the last is the end-of-text token's.
    """

    index: int
    tokens: tuple[int, ...]
    longest: int
    until: tuple[str, ...]
    truncated: bool


def make_writings(
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[list[int]],
    settings: Sequence[dict[str, Any]],
    *,
    max_length: int,
    default_longest: int,
    truncate: bool = False,
) -> list[Writing]:
    """Read lm-eval's generation settings.

    Args:
        truncate: cut contexts that leave no room for the text from the left, as lm-eval does.

    Raises:
        UserError: a task asks for sampling or beams, or for more tokens than the model's context; or a context is too
            long and `truncate` is not set.
    """
    eos = str(tokenizer.decode([tokenizer.eos_token_id])) if tokenizer.eos_token_id is not None else None
    writings = []
    for index, (context, given) in enumerate(zip(contexts, settings, strict=True)):
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, default_longest))
        for name, value in wanted.items():
            if name not in _IGNORED and not (name in _GREEDY and value == _GREEDY[name]):
                raise UserError(
                    f"expected a task that generates greedily; found {name}={value!r} in its generation_kwargs: only "
                    "greedy decoding is supported, choose another task"
                )
        longest = int(wanted["max_gen_toks"])
        if not 0 < longest < max_length:
            raise UserError(
                f"expected max_gen_toks from 1 to below {max_length}, the model's context; found {longest}: use a "
                "model with a longer context"
            )
        until = tuple(handle_stop_sequences(list(wanted["until"]), eos))
        room = max_length - longest
        if len(context) > room and not truncate:
            raise UserError(
                f"expected contexts of at most {room} tokens, the model's {max_length} less {longest} to generate; "
                f"found {len(context)}: use a model with a longer context, or let evals/run.py cut their beginnings "
                "off with --truncate, as lm-eval does"
            )
        writings.append(Writing(index, tuple(context[-room:]), longest, until, len(context) > room))
    return writings


def batch_writings(writings: Sequence[Writing], batch_tokens: int) -> list[list[Writing]]:
    """Cut into batches that write equally many tokens at most, longest context first, by a budget of tokens."""
    batches: list[list[Writing]] = []
    for one in sorted(writings, key=lambda w: (w.longest, -len(w.tokens), w.tokens)):
        batch = batches[-1] if batches else []
        same = batch and batch[0].longest == one.longest
        if same and (len(batch) + 1) * (len(batch[0].tokens) + one.longest) <= batch_tokens:
            batch.append(one)
        else:
            batches.append([one])
    return batches


def write_greedily(
    step: Step,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Writing],
    device: torch.device,
    ends: frozenset[int],
    all_done: Callable[[bool], bool],
) -> list[str]:
    """Write the texts of one batch.

    Args:
        step: (input_ids [B, T], attention_mask [B, S + written], position_ids [B, T], cache) -> (likeliest next token
            of each row [B], cache).
        batch: empty on a rank that only takes part.
        ends: tokens that end a text.
        all_done: whether every rank has finished, given whether this one has; called by all ranks after each step.
    """
    written: list[list[int]] = [[] for _ in batch]
    done = [False] * len(batch)
    ids, mask = _pad_left([row.tokens for row in batch] or [(0,)], device)
    positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), None
    while True:
        following, cache = step(ids, mask, positions, cache)
        for index, row in enumerate(batch):
            if not done[index]:
                written[index].append(int(following[index]))
                done[index] = _ended(tokenizer, row, written[index], ends)
        if all_done(all(done)):
            return [_text(tokenizer, row, tokens) for row, tokens in zip(batch, written, strict=True)]
        if all(done):  # only the other ranks go on: a single token keeps them company
            ids, mask = _pad_left([(0,)], device)
            positions, cache = torch.zeros_like(ids), None
        else:
            ids, positions = following[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)


def _pad_left(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, S]; padding repeats a row's first token and is masked."""
    width = max(map(len, rows))
    ids = [(row[0],) * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _ended(tokenizer: PreTrainedTokenizerBase, row: Writing, tokens: list[int], ends: frozenset[int]) -> bool:
    if len(tokens) >= row.longest or tokens[-1] in ends:
        return True
    text = str(tokenizer.decode(tokens))
    return any(stop in text for stop in row.until if stop)


def _text(tokenizer: PreTrainedTokenizerBase, row: Writing, tokens: list[int]) -> str:
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return postprocess_generated_text(text, list(row.until), None)
