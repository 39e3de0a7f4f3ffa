"""What a lens reads off every layer for a few texts, token by token, in a run's original model and in its result."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from unlearn.device import choose_device
from unlearn.errors import UserError
from unlearn.files import write_json
from unlearn.lens import TunedLens
from unlearn.model import load_model, load_tokenizer, residual_streams
from unlearn.model_config import check_rows, largest_tokens
from unlearn.precision import DTYPES

LONGEST = 32  # tokens of a text that are read: as many columns as a page can show
FILE = "lens.json"

Stage = Literal["before", "after"]
Autocast = Callable[[], AbstractContextManager[object]]


def write_readings(folder: Path, config: dict[str, Any], prompts: Sequence[str], device: str | None = None) -> None:
    """Read `prompts` in a run's original and exported model, both loaded for it, and write `folder/lens.json`.

    Args:
        config: the run's flags: model, revision, lens, dtype. device: see `choose_device`.

    Raises:
        UserError: the run has no model or no lens, or one of them cannot be read.
    """
    if not (folder / "model").is_dir():
        raise UserError(f"expected an exported model in {folder / 'model'} for --prompts; found none: finish the run")
    if not config.get("lens"):
        raise UserError(f"--prompts has no effect on {folder}, a run without a lens: leave it out")
    dtype, place = DTYPES[config["dtype"]], choose_device(device)
    tokenizer = load_tokenizer(config["model"], revision=config.get("revision"))
    original = load_model(config["model"], revision=config.get("revision"), dtype=dtype, device=place)
    lens = TunedLens.load(config["lens"], original).to(dtype)
    before = read_prompts(original, lens, tokenizer, prompts, "before")
    del original  # one model at a time
    unlearned = load_model(str(folder / "model"), dtype=dtype, device=place)
    write_stage(folder, lens, config["lens"], before, "before")
    write_stage(folder, lens, config["lens"], read_prompts(unlearned, lens, tokenizer, prompts, "after"), "after")


def read_prompts(
    model: PreTrainedModel,
    lens: TunedLens,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    stage: Stage,
    autocast: Autocast = nullcontext,
) -> list[dict[str, Any]]:
    """Read the first tokens of every prompt. Every rank that has a share of the model must call it.

    Args:
        autocast: the precision of the model's forward pass.

    Returns:
        for each prompt {"tokens": the read ones as text, "total_tokens", `stage`: what `read_layers` returns}.
    """
    texts = encode_prompts(tokenizer, prompts, model.config)
    return [
        {"tokens": [tokenizer.decode([token]) for token in text[:LONGEST]], "total_tokens": len(text)}
        | {stage: read_layers(model, lens, tokenizer, text[:LONGEST], autocast)}
        for text in texts
    ]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], config: PretrainedConfig
) -> list[list[int]]:
    """Token ids of every prompt; `UserError` if the model of this configuration has no row for one that is read."""
    texts: list[list[int]] = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    check_rows(config, largest_tokens({"--prompts": [text[:LONGEST] for text in texts]}))
    return texts


def write_stage(folder: Path, lens: TunedLens, name: str, prompts: list[dict[str, Any]], stage: Stage) -> None:
    """Write what `read_prompts` returns to `folder/lens.json`: "after" beside what was read of them "before"."""
    file = folder / FILE
    if stage == "after" and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))["prompts"]
        prompts = [old | new for old, new in zip(before, prompts, strict=True)]
    entropy = math.log(lens.unembedding.shape[0])
    write_json(file, {"model": lens.base_name, "lens": name, "uniform_entropy": entropy, "prompts": prompts})


@torch.no_grad()
def read_layers(
    model: PreTrainedModel,
    lens: TunedLens,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    autocast: Autocast = nullcontext,
) -> list[dict[str, Any]]:
    """What the lens predicts as the next token at every position, layer by layer.

    Args:
        lens: with all translators, of the original model: its norm and unembedding read the result's layers too.
        tokens: ids of one text, 1 or more.

    Returns:
        for each l in 0..L, L being the stream that leaves the last block: {"layer": l, "tokens": the likeliest next
        token after each position, "probability": its probability, "entropy": of the whole prediction, in nats}.
    """
    device = lens.unembedding.device
    with autocast():
        streams = residual_streams(model, torch.tensor([tokens], device=device), range(lens.depth + 1))
    return [_read(lens.logits(streams[layer][0], layer), layer, tokenizer) for layer in range(lens.depth + 1)]


def _read(logits: Tensor, layer: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One layer's row, from its float32 logits [S, V]."""
    log_probabilities = logits.log_softmax(dim=-1)  # [S, V]
    best, chosen = log_probabilities.max(dim=-1)  # [S]
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)  # [S]
    return {
        "layer": layer,
        "tokens": [tokenizer.decode([token]) for token in chosen.tolist()],
        "probability": best.exp().tolist(),
        "entropy": entropy.tolist(),
    }
