"""What a run chooses for itself where its flags leave it open: how the model lies on the ranks, and what the backward
pass computes again. Both change the time and the memory that a run takes, and its result by no more than rounding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from unlearn.config import TrainConfig
from unlearn.memory import Layout, Shape, peak_gib
from unlearn.methods.terms import Needs

MARGIN = 1.1  # what the formula of memory may be off by
KINDS: tuple[Literal["none", "selective"], ...] = ("none", "selective")  # fastest first


def settled(
    config: TrainConfig, shape: Shape, needs: Sequence[Needs], world_size: int, per_node: int, limit_gib: float
) -> tuple[TrainConfig, list[str]]:
    """The flags with `shard` and `checkpoint_activations` given, and a line about each that was chosen here.

    Args:
        per_node: ranks of one node. limit_gib: memory that one rank may plan with.
    """
    config, layout_line = _with_layout(config, shape, needs, world_size, per_node, limit_gib)
    layout = Layout.of(config, world_size, per_node)
    config, kept_line = _with_checkpointing(config, shape, needs, layout, limit_gib)
    return config, layout_line + kept_line


def _with_layout(
    config: TrainConfig, shape: Shape, needs: Sequence[Needs], world_size: int, per_node: int, limit_gib: float
) -> tuple[TrainConfig, list[str]]:
    """Hybrid across nodes, where a copy fits into one: the network between nodes then carries gradients alone, once a
    step, and not the weights of every forward and backward pass."""
    if config.shard is not None or config.lora_rank or not 1 < per_node < world_size or world_size % per_node:
        return config, []
    hybrid = replace(config, shard="hybrid")
    planned = peak_gib(hybrid, shape, Layout.of(hybrid, world_size, per_node), needs)
    if planned * MARGIN > limit_gib:
        why = f"a copy on each node would need {planned:.1f} GiB a rank, of {limit_gib:.1f}"
        return replace(config, shard="full"), [f"--shard full: {why}"]
    why = f"each node's {per_node} ranks share a copy, so that nodes exchange nothing but gradients, once a step"
    return hybrid, [f"--shard hybrid: {why}"]


def _with_checkpointing(
    config: TrainConfig, shape: Shape, needs: Sequence[Needs], layout: Layout, limit_gib: float
) -> tuple[TrainConfig, list[str]]:
    if config.checkpoint_activations is not None:
        return config, []
    for kind in KINDS:
        fastest = replace(config, checkpoint_activations=kind)
        planned = peak_gib(fastest, shape, layout, needs)
        if planned * MARGIN <= limit_gib:
            return fastest, [f"--checkpoint-activations {kind}: planned {planned:.1f} GiB a rank, of {limit_gib:.1f}"]
    return replace(config, checkpoint_activations="full"), [
        f"--checkpoint-activations full: selective would need {planned:.1f} GiB a rank, of {limit_gib:.1f}"
    ]
