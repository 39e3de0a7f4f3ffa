"""What a lens reads off every layer for a few texts, token by token, in a run's original model and in its result."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.distributed import local_device
from unlearn.errors import UserError
from unlearn.files import write_json
from unlearn.lens import TunedLens
from unlearn.model import load_model, load_tokenizer, residual_streams
from unlearn.precision import DTYPES

LONGEST = 32  # tokens of a text that are read: as many columns as a page can show
FILE = "lens.json"


def write_readings(folder: Path, config: dict[str, Any], prompts: Sequence[str]) -> None:
    """Read `prompts` in the run's original and exported model and write `folder/lens.json`, as `read_models` returns.

    Args:
        config: the run's flags: model, revision, lens, dtype.

    Raises:
        UserError: the run has no model or no lens, or one of them cannot be read.
    """
    if not (folder / "model").is_dir():
        raise UserError(f"expected an exported model in {folder / 'model'} for --prompts; found none: finish the run")
    if not config.get("lens"):
        raise UserError(f"--prompts has no effect on {folder}, a run without a lens: leave it out")
    dtype, device = DTYPES[config["dtype"]], local_device()
    tokenizer = load_tokenizer(config["model"], revision=config.get("revision"))
    texts = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    original = load_model(config["model"], revision=config.get("revision"), dtype=dtype, device=device)
    lens = TunedLens.load(config["lens"], original).to(dtype)
    before = [read_layers(original, lens, tokenizer, text[:LONGEST]) for text in texts]
    del original  # one model at a time
    unlearned = load_model(str(folder / "model"), dtype=dtype, device=device)
    after = [read_layers(unlearned, lens, tokenizer, text[:LONGEST]) for text in texts]
    write_json(
        folder / FILE,
        {
            "model": config["model"],
            "lens": config["lens"],
            "uniform_entropy": math.log(lens.unembedding.shape[0]),
            "prompts": [
                {
                    "tokens": [tokenizer.decode([token]) for token in text[:LONGEST]],
                    "total_tokens": len(text),
                    "before": before[index],
                    "after": after[index],
                }
                for index, text in enumerate(texts)
            ],
        },
    )


@torch.no_grad()
def read_layers(
    model: PreTrainedModel, lens: TunedLens, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]
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
