"""Whether the text of an attack is new to the model: what the run that made it has read, against what is drawn."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from unlearn.corpus import Corpus, read_corpus
from unlearn.distributed import all_true, from_main
from unlearn.errors import UserError


def seen_warnings(
    model: str, drawn: Mapping[str, Corpus], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[str]:
    """A sentence for each text of the attack that stands in a corpus of the run that exported the model: how many
    windows; or that this cannot be known. None where `model` is no run's. Every rank must call it.

    Whole documents are found, whatever the windows of the run were: its corpus is cut as the attack's is.

    Args:
        model: the attacked model, a path or hub name. drawn: by data of the attack, the windows that it draws.
        seq_len: of the attack.
    """
    run = from_main(_run_of(model))  # another node may have the model's folder without its run's
    warnings = []
    for which in ("forget", "retain") if run else ():
        if f"{which} corpus" not in run["identity"]:
            continue
        corpus = _corpus(run, which, tokenizer, seq_len)
        if corpus is None:
            warnings.append(
                f"the {which} corpus of the run that made the model cannot be read as it was ({run[which]}), so nobody "
                "knows whether the attack's text stands in it"
            )
            continue
        keys = corpus.keys()
        for name, text in drawn.items():
            shared = len(text.keys() & keys)
            if shared:
                warnings.append(
                    f"{shared:,} of the {len(text.windows):,} windows of {name} text that the attack draws stand in "
                    f"the {which} corpus of the run that made the model ({run[which]}): what comes back by them is "
                    "text that unlearning has seen, and no attack by new text"
                )
    return warnings


def _run_of(model: str) -> dict[str, Any]:
    """The flags of the run that exported a model to its folder, and `identity`, digests of what it read; else {}."""
    folder = Path(model).expanduser().absolute().parent
    try:
        config, recorded = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "run.json"))
        return dict(config) | {"identity": dict(recorded["identity"])} if {"forget", "retain"} <= config.keys() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _corpus(run: Mapping[str, Any], which: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Corpus | None:
    """A corpus of the run in windows of the attack; None where it is not there any more, or other text is."""
    columns: dict[str, Any] = {name: run.get(f"{which}_{name}") for name in ("column", "template")}
    try:
        found = read_corpus(run[which], tokenizer, seq_len=run["seq_len"], **columns)
        same = found.sha256() == run["identity"][f"{which} corpus"]
    except UserError:
        same = False
    if not all_true(same, torch.device("cpu")):
        return None
    return read_corpus(run[which], tokenizer, seq_len=seq_len, **columns)
