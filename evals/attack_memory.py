"""Whether the attacks of a grid fit into memory, before anything of a model is read but its configuration.

The formula is the unlearning run's (`unlearn/memory.py`), for a loss on the next token alone: there is no original, no
lens, and one term of gradients.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from evals.fine_tuning import AttackFlags
from evals.tamper_config import Attack, TamperConfig
from unlearn.config import TrainConfig, configure
from unlearn.data import Batches
from unlearn.distributed import world_size
from unlearn.errors import UserError
from unlearn.files import size
from unlearn.losses import CHUNK
from unlearn.memory import DTYPE_BYTES, GIB, Layout, Shape, available_gib, check_rank, micro_tokens, one_block, terms
from unlearn.methods.terms import Needs
from unlearn.model import empty_model

BLOCK = ("one block's backward pass", "gathered blocks")  # of `terms`, beside what is held all the time
HEAD = ("a chunk over the vocabulary", "unembedding and its gradient")


def check_attacks_fit(config: TamperConfig, batches: Mapping[Attack, Batches], device: torch.device) -> None:
    """Refuse a grid of which an attack cannot fit.

    Raises:
        UserError: names the attack, its largest term and what would help; or an adapter's rank is above a full one.
    """
    limit = available_gib(device)
    for subject in config.subjects():
        shape = Shape.of(empty_model(subject.model, revision=subject.revision), config.lora_targets)
        for attack in config.attacks():
            check_rank(attack.lora_rank, shape)
            kind = config.shard_kind(attack, world_size())
            flags = AttackFlags.of(config, subject, attack)
            training = as_training(flags, batches[attack], kind, config.shard_size, world_size())
            layout = Layout.of(training, world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
            found = attack_terms(training, shape, layout)
            peak, largest = sum(found.values()), max(found, key=lambda name: found[name])
            if peak > limit * GIB:
                raise UserError(
                    f"expected an attack that fits into {size(int(limit * GIB))}; found a planned peak of "
                    f"{size(int(peak))} for {attack.name} on {subject.name}, most of it {largest} "
                    f"({size(int(found[largest]))}): lower --micro-batch or --seq-len, give --lora-rank, or use more "
                    "GPUs"
                )


def as_training(flags: AttackFlags, batches: Batches, kind: str, shard_size: int | None, ranks: int) -> TrainConfig:
    """The unlearning run that trains as the attack does: on retain text alone, at the attack's longest windows."""
    rows = min(flags.micro_batch, math.ceil(batches.batch / ranks))
    longest = max(len(batches.corpus.windows[index]) for index in set(batches.order))
    lora: dict[str, Any] = {"lora_alpha": flags.lora_alpha, "lora_dropout": 0.0, "lora_targets": flags.lora_targets}
    return configure(
        model=flags.model,
        revision=flags.revision,
        remove_coef=0.0,
        retain_loss="kl",
        lora_rank=flags.lora_rank,
        micro_batch=rows,
        seq_len=max(3, longest),
        dtype=flags.dtype,
        shard=kind,
        shard_size=shard_size,
        checkpoint_activations=flags.checkpoint_activations,
        **(lora if flags.lora_rank else {}),
    )


def attack_terms(config: TrainConfig, shape: Shape, layout: Layout) -> dict[str, float]:
    """Bytes of one GPU at the fullest moment of a step; see `unlearn.memory.terms`.

    Args:
        config: of `as_training`.
    """
    found = terms(config, shape, layout, [Needs(original=True)] * 2)
    found.pop("reference", None)
    if config.shard_kind(layout.world_size) == "replicate":
        found["gradients"] /= 2  # there is one term of the loss
    held = {name: value for name, value in found.items() if name not in (*BLOCK, *HEAD)}
    block = one_block(config, shape, layout)
    return held | max(block, _head(config, shape, layout), key=lambda moment: sum(moment.values()))


def _head(config: TrainConfig, shape: Shape, layout: Layout) -> dict[str, float]:
    """Bytes of the cross-entropy: four arrays of a chunk's logits, and the unembedding with its gradient.

    Sharded, the unembedding and the embedding are gathered, and the gradient is there as computed and in float32 for
    the reduction; replicated, only the gradient is new.
    """
    compute = DTYPE_BYTES[config.dtype]
    result = {HEAD[0]: float(16 * min(CHUNK, micro_tokens(config)) * shape.vocabulary)}
    numbers = 2 * compute + (0 if config.lora_rank else 4)
    if config.shard_kind(layout.world_size) == "replicate":
        numbers = 0 if config.lora_rank else 4 + (compute if compute < 4 else 0)
    return result | ({HEAD[1]: float(shape.head * numbers)} if numbers else {})
