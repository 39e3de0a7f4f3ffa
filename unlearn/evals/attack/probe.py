"""A linear probe: what the residual stream at the end of a question says of its right answer.

A model that answers nothing may still compute the answer. The probe is a ridge classifier from h[l] at the question's
last token to the letter of the right answer, fitted on four fifths of the questions and read on the fifth that it has
not seen. With the right answers shuffled among the questions, it shows what such a probe reads out of nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.model import residual_streams
from unlearn.model_config import check_rows

FOLDS = 5
PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # times the mean square of a standardised feature, which is 1


@torch.no_grad()
def last_streams(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[str], layers: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """{l: h[l] [questions, D]} at the last token of each context, read one by one."""
    device = next(model.parameters()).device
    found: dict[int, list[NDArray[np.float64]]] = {layer: [] for layer in layers}
    for context in contexts:
        ids = torch.tensor([tokenizer(context)["input_ids"]], device=device)
        check_rows(model.config, {"the questions": int(ids.max())})
        for layer, stream in residual_streams(model, ids, layers).items():
            found[layer].append(stream[0, -1].double().cpu().numpy())
    return {layer: np.stack(rows) for layer, rows in found.items()}


def probe(features: NDArray[np.float64], targets: Sequence[int], *, seed: int = 0) -> list[bool]:
    """Whether the probe is right about each question, as one of those that it was not fitted on.

    The penalty of each fold is chosen by the same split within the questions that it is fitted on.

    Args:
        features: [questions, D]. targets: the right answer of each.
    """
    right, places = np.asarray(targets), _folds(len(targets), seed)
    found = np.zeros(len(targets), dtype=bool)
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(places != fold), np.flatnonzero(places == fold)
        if len(outside) and len(inside):
            penalty = _best_penalty(features[inside], right[inside], seed)
            found[outside] = _predicted(features[inside], right[inside], features[outside], penalty) == right[outside]
    return found.tolist()


def shuffled_targets(targets: Sequence[int], *, seed: int = 0) -> list[int]:
    """The right answers, dealt out to the questions anew."""
    return np.random.default_rng([seed, 1]).permutation(np.asarray(targets)).tolist()


def _folds(count: int, seed: int) -> NDArray[np.int64]:
    """Which fold each question is in: as many in each."""
    return np.random.default_rng([seed, 0]).permutation(np.arange(count) % FOLDS)


def _best_penalty(features: NDArray[np.float64], right: NDArray[np.int64], seed: int) -> float:
    places = _folds(len(right), seed + 1)
    inside, outside = places != 0, places == 0
    hits = [
        (_predicted(features[inside], right[inside], features[outside], penalty) == right[outside]).sum()
        for penalty in PENALTIES
    ]
    return PENALTIES[int(np.argmax(hits))]


def _predicted(
    features: NDArray[np.float64], right: NDArray[np.int64], asked: NDArray[np.float64], penalty: float
) -> NDArray[np.int64]:
    """Least squares onto one column a letter, with a penalty; the letter of the greatest column."""
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-12
    inside, outside = (features - mean) / spread, (asked - mean) / spread
    letters = np.unique(right)
    wanted = (right[:, None] == letters) - (right[:, None] == letters).mean(axis=0)
    count, width = inside.shape
    if width <= count:
        weights = np.linalg.solve(inside.T @ inside + penalty * count * np.eye(width), inside.T @ wanted)
    else:  # the same by the smaller matrix
        weights = inside.T @ np.linalg.solve(inside @ inside.T + penalty * count * np.eye(count), wanted)
    return letters[np.argmax(outside @ weights + (right[:, None] == letters).mean(axis=0), axis=1)]
