"""What is looked at before the first step: that all ranks run the same code on the same data, and that the disk has
room. Recorded in run.json, by which a run that goes on is known to be the same run."""

import hashlib
import importlib.metadata
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from unlearn.corpus import Corpus
from unlearn.device import driver_version
from unlearn.distributed import all_sum, fail_together, gather, is_main, world_size
from unlearn.errors import UserError
from unlearn.files import add_parts, files_hash, size

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "safetensors", "datasets", "lm_eval", "numpy")
TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja "
    "chat_template.json vocab.json merges.txt vocab.txt tokenizer.model spiece.model"
).split()
NUMBERS = 1 << 16  # of each tensor in a digest


def versions() -> dict[str, str]:
    """Of the language, the libraries that decide about numbers, and of CUDA and NCCL where there are any."""
    found = {"python": platform.python_version()}
    found |= {package: importlib.metadata.version(package) for package in PACKAGES}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        found |= {"gpu": torch.cuda.get_device_name(), "driver": driver_version() or "unknown"}
    return found


def code_hash() -> str:
    """sha256 over the code of this project that a run may execute: sweeps and reports are none of it."""
    digest, package = hashlib.sha256(), ROOT / "unlearn"
    for file in sorted(package.rglob("*.py")):
        if not file.is_relative_to(package / "launch"):
            add_parts(digest, str(file.relative_to(ROOT)).encode(), file.read_bytes())
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and evenly spread numbers of whole tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        stride = max(1, flat.numel() // NUMBERS)
        add_parts(digest, f"{name} {tuple(tensor.shape)}".encode(), flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_ranks(facts: Mapping[str, Any], device: torch.device) -> None:
    """Raise, on every rank, unless all ranks bring the same `facts` and sum numbers on `device` as they should.

    Raises:
        UserError: names the ranks that differ from the others, and in what.
    """
    told = gather({key: str(value) for key, value in facts.items()})
    for key in told[0]:
        values = [of_rank.get(key) for of_rank in told]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            raise UserError(
                f"expected the same {key} on every rank, {_short(usual)} as on rank {values.index(usual)}; found "
                f"{_short(values[odd[0]])} on rank {', '.join(map(str, odd))}: start every node from the same place"
            )
    found = all_sum(torch.ones((), device=device)).item()
    if found != world_size():
        raise UserError(
            f"expected {world_size()} as the sum of a one from every rank; found {found}: check the network"
        )


def _short(value: str | None) -> str:
    return str(value) if len(str(value)) <= 80 else f"{str(value)[:77]}..."


def checkpoint_bytes(optimizers: Mapping[str, Optimizer]) -> int:
    """Size of a checkpoint: parameters and their state, two numbers each for AdamW and one for Muon."""
    total = 0
    for optimizer in optimizers.values():
        states = 2 if isinstance(optimizer, AdamW) else 1
        for group in optimizer.param_groups:
            total += sum(p.numel() * p.element_size() * (1 + states) for p in group["params"])
    return total


def settings_hashes(folder: Path) -> dict[str, str]:
    """Digests of what a model's folder holds beside its weights: its configuration, and its tokenizer's files."""
    tokenizer = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    return {"config.json": files_hash([folder / "config.json"]), "tokenizer": files_hash(tokenizer)}


def check_apart(corpora: Mapping[str, Corpus]) -> None:
    """Raise if forget and retain text are the same, and warn if they have windows in common.

    A loss that forgets and one that retains the same text work against each other; held out text is none if it is in
    the other corpus.

    Raises:
        UserError: on every rank.
    """
    if len(corpora) < 2:
        return
    forget, retain = corpora["forget"], corpora["retain"]
    with fail_together():
        if is_main():
            shared = len(forget.keys() & retain.keys())
            if shared == len(forget.keys()) == len(retain.keys()):
                raise UserError(
                    f"expected --retain to be other text than --forget; found the same {shared} windows in "
                    f"{forget.name} and {retain.name}: choose another corpus for one of them"
                )
            if shared:
                print(
                    f"warning: expected --retain to be other text than --forget; found {shared:,} windows of the "
                    f"{len(forget.windows):,} of {forget.name} in {retain.name} too",
                    file=sys.stderr,
                    flush=True,
                )


def check_disk(folder: Path, *, checkpoint: int, count: int, export: int) -> None:
    """Raise unless there is room in `folder` for `count` checkpoints beyond those already there, and the export.

    Where checkpoints/ is a link to another disk, the checkpoints need room there.

    Args:
        checkpoint, export: bytes of one.
    """
    with fail_together():
        if is_main():
            if (folder / "checkpoints").is_symlink():
                _check_room(folder / "checkpoints", checkpoint, count, 0)
                count = 0
            _check_room(folder, checkpoint, count, export)


def _check_room(folder: Path, checkpoint: int, count: int, export: int) -> None:
    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    free, needed = shutil.disk_usage(nearest).free, checkpoint * count + export
    if needed > free:
        raise UserError(
            f"expected {size(needed)} of free disk for {folder} ({count} checkpoint(s) of {size(checkpoint)}, one of "
            f"them while it replaces another, and the export of {size(export)}); found {size(free)}: free some, choose "
            "another --output, or give --save-every 0"
        )
