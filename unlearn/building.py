"""The parts of an unlearning run, from its flags: models without memory yet, adapted and sharded; the objective."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from unlearn.config import TrainConfig
from unlearn.data import Batches
from unlearn.lens import TunedLens
from unlearn.lora import add_lora
from unlearn.model import disable_dropout, empty_model
from unlearn.objectives.lens import Coefficients, LensObjective, Reference, without_adapters
from unlearn.precision import DTYPES, autocast
from unlearn.sharding import checkpoint_blocks, compile_blocks, shard


class ModelFlags(Protocol):
    """The flags of a command that decide how the model in training is built."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def lora_rank(self) -> int: ...
    @property
    def lora_alpha(self) -> float | None: ...
    @property
    def lora_dropout(self) -> float | None: ...
    @property
    def lora_targets(self) -> Sequence[str]: ...
    @property
    def checkpoint_activations(self) -> bool: ...
    @property
    def compile_blocks(self) -> bool: ...


def master_dtype(config: ModelFlags) -> torch.dtype:
    """Of the model's weights in memory: float32 where they are trained, else what they compute in."""
    return torch.float32 if config.lora_rank == 0 else DTYPES[config.dtype]


def trained_model(config: ModelFlags, mesh: DeviceMesh | None) -> PreTrainedModel:
    """The model in training, on the meta device: adapters added (float32), blocks checkpointed, rows sharded."""
    model = empty_model(config.model, revision=config.revision, dtype=master_dtype(config))
    disable_dropout(model)
    if config.lora_rank > 0:
        assert config.lora_alpha is not None and config.lora_dropout is not None
        targets = config.lora_targets
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets, seed=config.seed)
    if config.checkpoint_activations:
        checkpoint_blocks(model)
    if config.compile_blocks:
        compile_blocks(model)
    if mesh is not None:
        shard(model, mesh, compute=DTYPES[config.dtype])
    return model


def original_model(config: TrainConfig, mesh: DeviceMesh | None) -> PreTrainedModel | None:
    """The frozen original for the retain loss of full training, on the meta device; None where there is no need.

    It computes as the model in training does, so that both are equal before the first step: unsharded, from float32
    weights under autocast, which leaves the residual stream in float32.
    """
    if config.lora_rank > 0 or config.retain_coef == 0.0:
        return None
    dtype = master_dtype(config) if mesh is None else DTYPES[config.dtype]
    model = empty_model(config.model, revision=config.revision, dtype=dtype).requires_grad_(False)
    disable_dropout(model)
    if mesh is not None:
        shard(model, mesh, compute=DTYPES[config.dtype], offload=config.offload_reference)
    return model


def lens_objective(
    config: TrainConfig,
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    lens: TunedLens,
    batches: Mapping[str, Batches],
    mesh: DeviceMesh | None,
) -> LensObjective:
    """What a batch costs; without an `original`, that is `model` with its adapters switched off."""
    reference: Reference = partial(without_adapters, model)
    if original is not None:
        reference = partial(nullcontext, original)  # type: ignore[assignment]
    compute, device = DTYPES[config.dtype], lens.unembedding.device
    steps = next(iter(batches.values())).steps
    return LensObjective(
        model=model,
        lens=lens,
        reference=reference,
        forget=batches.get("forget"),
        retain=batches.get("retain"),
        coefficients=Coefficients(config.remove_coef or 0.0, config.retain_coef or 0.0, config.retain_start, steps),
        layers=config.layers,
        tap=config.lens_tap,
        forget_loss=config.forget_loss,
        retain_loss=config.retain_loss or "kl",
        autocast=autocast(master_dtype(config) if mesh is None else compute, compute, device),
    )
