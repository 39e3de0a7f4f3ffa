"""Sample a corpus from a model: `python -m unlearn sample`.

    python -m unlearn sample --model MODEL --output retain.jsonl --examples 1024
    torchrun --nproc_per_node 4 -m unlearn sample --model MODEL --output retain.parquet --examples 100000 --batch 128

A batch always holds the same texts, whichever rank writes it, and text i draws its tokens by numbers of (seed, i): so
any number of ranks gives the same file. Rank 0 appends finished batches, in order, to `OUTPUT.partial`, from which the
same command goes on.

Shapes: B texts, V vocabulary.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.distributed import fail_together, from_main, gather, is_main, process_group, rank, world_size
from unlearn.errors import UserError
from unlearn.files import files_hash, sync, writing
from unlearn.model import load_model, load_tokenizer
from unlearn.precision import DTYPES
from unlearn.progress import progress
from unlearn.run.folder import output_folder
from unlearn.run.lock import locked
from unlearn.sample_config import SampleConfig
from unlearn.seeding import generator
from unlearn.weights import Checkpoint

Row = dict[str, Any]  # a text, its index and its number of sampled tokens
UNIT = 1 << 40  # a probability of 1, as a whole number
FREE = ("output", "overwrite", "device")  # flags that leave the texts as they are


def sample(config: SampleConfig) -> None:
    """Sample the whole corpus and write it; every rank must call this.

    Raises:
        UserError: `--output` is there already or may not be written; an unfinished command had other flags; the model
            or its tokenizer cannot be used; or no text is left.
    """
    output = output_folder(str(Path(config.output).parent)) / Path(config.output).name
    partial = output.with_name(output.name + ".partial")
    with process_group(config.device) as device:
        identity = _identity(config)
        model = load_model(config.model, revision=config.revision, dtype=DTYPES[config.dtype], device=device)
        tokenizer = load_tokenizer(config.model, revision=config.revision)
        start = start_tokens(tokenizer, config, model.config.max_position_embeddings)
        done = 0
        with ExitStack() as stack:
            with fail_together():
                if is_main():
                    stack.enter_context(locked(output.with_name(f".{output.name}.lock"), "command that samples"))
                    done = _begin(config, output, partial, identity)
            write = functools.partial(write_batch, model, tokenizer, start, config)
            _write_batches(config, partial, from_main(done), write)
            with fail_together():
                if is_main():
                    _finish(output, partial)


def start_tokens(tokenizer: PreTrainedTokenizerBase, config: SampleConfig, longest: int) -> list[int]:
    """What every text begins with: --start, or the token that begins (else ends) a document.

    Args:
        longest: positions that the model has.

    Raises:
        UserError: there is no such token, or no room for --tokens behind it.
    """
    if config.start:
        start = [int(token) for token in tokenizer(config.start)["input_ids"]]
    else:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError(
                "expected a token that begins or ends a document; found none in the tokenizer: give --start"
            )
        start = [int(first)]
    if len(start) + config.tokens > longest:
        raise UserError(
            f"expected --start and --tokens within the model's {longest} positions; found {len(start)} and "
            f"{config.tokens} tokens: lower --tokens"
        )
    return start


@torch.no_grad()
def write_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: list[int], config: SampleConfig, batch: int
) -> list[Row]:
    """The texts of one batch, from index `batch` x `config.batch` on."""
    indices = range(batch * config.batch, min((batch + 1) * config.batch, config.examples))
    # one number in [0, 1) a token, drawn before: how long other texts are changes nothing
    numbers = torch.stack(
        [torch.rand(config.tokens, generator=generator(config.seed, "sample", i), dtype=torch.float64) for i in indices]
    ).to(model.device)  # [B, tokens]
    ids = torch.tensor([start] * len(indices), device=model.device)
    written = torch.empty(len(indices), 0, dtype=torch.int64, device=model.device)
    ended = torch.zeros(len(indices), dtype=torch.bool, device=model.device)
    ends, cache = end_tokens(model, tokenizer), None
    end_ids = torch.tensor(sorted(ends), device=model.device)
    for step in range(config.tokens):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = result.past_key_values, result.logits[:, -1]
        ids = draw(logits, numbers[:, step], config.temperature, config.top_p)[:, None]
        written = torch.cat([written, ids], dim=1)
        ended |= torch.isin(ids[:, 0], end_ids)
        if ended.all():
            break
    return [_row(tokenizer, start, i, row, ends) for i, row in zip(indices, written.tolist(), strict=True)]


def draw(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by inversion: the first, from the likeliest down, at which the sum of probabilities passes the
    row's number.

    Args:
        logits: [B, V]. numbers: float64 [B] in [0, 1).

    Returns:
        int64 [B], among the fewest likeliest tokens that have the probability `top_p` together (nucleus sampling,
        https://arxiv.org/abs/1904.09751).
    """
    probability, token = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    shares = (probability.double() * UNIT).round().long()  # whole numbers: a GPU adds others up in no fixed order
    reached = shares.cumsum(-1)  # [B, V]
    kept = (reached - shares < top_p * UNIT).sum(-1, keepdim=True)  # [B, 1], at least 1
    whole = reached.gather(1, kept - 1)
    place = torch.searchsorted(reached, (numbers[:, None] * whole).long(), right=True).clamp(max=kept - 1)
    return token.gather(1, place)[:, 0]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens after which a text is over: the tokenizer's and those of the model's generation config."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = found if isinstance(found, list) else [found]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _row(tokenizer: PreTrainedTokenizerBase, start: list[int], index: int, tokens: list[int], ends: set[int]) -> Row:
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(start + tokens[:length], skip_special_tokens=True))
    return {"text": text, "index": index, "tokens": length}


def _write_batches(config: SampleConfig, partial: Path, done: int, write: Callable[[int], list[Row]]) -> None:
    """Write the batches from `done` on, one a rank at a time; rank 0 appends them in order."""
    batches = -(-config.examples // config.batch)
    before = min(done * config.batch, config.examples)
    with progress(config.examples, "sampling", "text", initial=before, leave=True) as bar:
        for first in range(done, batches, world_size()):
            own = first + rank()
            rows: list[Row] = []
            with fail_together():
                rows = write(own) if own < batches else []
            found = [row for some in gather(rows) for row in some]
            with fail_together():
                if is_main():
                    _append(partial, found)
            bar.update(len(found))


def _identity(config: SampleConfig) -> dict[str, Any]:
    """What the texts depend on."""
    flags = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    weights = files_hash(Checkpoint.open(config.model, revision=config.revision).paths())
    return flags | {"model": None, "weights": weights}


def _begin(config: SampleConfig, output: Path, partial: Path, identity: dict[str, Any]) -> int:
    """Look at what is there; the number of batches that an earlier attempt has finished."""
    if output.exists() and not config.overwrite:
        raise UserError(f"expected a new file for --output; found {output}: choose another name, or give --overwrite")
    lines = _lines(partial) if partial.exists() else []
    if lines and json.loads(lines[0]) == identity:
        rows = lines[1:]
        whole = len(rows) if len(rows) == config.examples else len(rows) // config.batch * config.batch
        _replace(partial, lines[: 1 + whole])
        return -(-whole // config.batch)
    if lines and not config.overwrite:
        raise UserError(
            f"expected the flags and the model of the command that left {partial}; found others: give its flags to go "
            "on with it, choose another --output, or give --overwrite"
        )
    _replace(partial, [json.dumps(identity)])
    return 0


def _lines(file: Path) -> list[str]:
    """The whole lines of a file that may have been cut off anywhere."""
    return file.read_bytes().decode("utf-8", errors="ignore").split("\n")[:-1]


def _replace(file: Path, lines: list[str]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with writing(file):
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, file)


def _append(file: Path, rows: list[Row]) -> None:
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
        stream.flush()
        os.fsync(stream.fileno())


def _finish(output: Path, partial: Path) -> None:
    """Write the corpus whole, without texts that have no words, and remove the partial file."""
    rows = [json.loads(line) for line in _lines(partial)[1:]]
    kept = [row for row in rows if row["text"].strip()]
    if not kept:
        raise UserError("expected texts from the model; found only empty ones: give --start, or more --tokens")
    temporary = output.with_name(output.name + ".tmp")
    with writing(output):
        if output.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(kept), temporary)
        else:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, output)
        partial.unlink()
    print(f"{len(kept):,} texts in {output}; {len(rows) - len(kept):,} empty ones left out", flush=True)
