"""A run without data: full windows, a lens whose numbers mean nothing, and what the terms of a loss need."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unlearn.batches import Batches
from unlearn.building import method_parts, method_terms, trained_model
from unlearn.config import TrainConfig
from unlearn.corpus import Corpus
from unlearn.lens import TunedLens
from unlearn.memory import micro_tokens
from unlearn.methods.terms import Needs
from unlearn.model import empty_model, final_norm
from unlearn.precision import DTYPES
from unlearn.weights import materialise


def needs_of(config: TrainConfig) -> list[Needs]:
    """What the terms of the run's loss need; of the model only config.json is read."""
    meta = torch.device("meta")
    windows, lens = full_windows(config, 1), partial(blank_lens, config, device=meta)
    parts = method_parts(config, trained_model(config, None), None, windows, lens, meta)
    return [term.needs for term in method_terms(config, parts)]


def blank_lens(config: TrainConfig, layers: Iterable[int], device: torch.device) -> TunedLens:
    """A lens of the right shape whose numbers mean nothing."""
    readout = empty_model(config.model, revision=config.revision, dtype=DTYPES[config.dtype])
    for part in (final_norm(readout), readout.get_output_embeddings()):
        materialise(part, device)
    width = int(readout.config.hidden_size)
    inside = [layer for layer in layers if layer < readout.config.num_hidden_layers]

    def empty() -> tuple[Tensor, Tensor]:
        return torch.empty(width, width, device=device), torch.empty(width, device=device)

    return TunedLens(readout, {layer: empty() for layer in inside})


def full_windows(config: TrainConfig, world_size: int, micro_batches: int = 2, steps: int = 2) -> dict[str, Batches]:
    """Global batches of `micro_batches` micro-batches a rank, all windows full: the costliest that the flags allow."""
    rows = max(1, micro_tokens(config) // config.seq_len)
    batch = micro_batches * rows * world_size
    count = steps * batch
    corpus = Corpus("full windows", count, [np.zeros(config.seq_len, dtype=np.int32)] * count)
    return {
        tag: Batches(corpus, examples=count, total=count, batch=batch, seed=0, tag=tag, micro_batch=rows)
        for tag in ("forget", "retain", "mix")
    }
