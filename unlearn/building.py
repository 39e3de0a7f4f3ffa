"""The parts of an unlearning run, from its flags: models without memory yet, adapted and sharded."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from unlearn.adversary import Adversary, adversary
from unlearn.batches import Batches
from unlearn.config import TrainConfig
from unlearn.distributed import fail_together
from unlearn.latent_attack import LatentAttack, latent_attack
from unlearn.lens import TunedLens
from unlearn.lora import add_lora, initial_adapters, lora_disabled
from unlearn.memory import reads_original
from unlearn.methods import method_module
from unlearn.methods.terms import Needs, Original, Parts, Phase, Term
from unlearn.model import disable_dropout, empty_model, final_norm, fresh_weights
from unlearn.optim.build import build_optimizers
from unlearn.parameters import train_only
from unlearn.precision import DTYPES, Precision, autocast
from unlearn.sharding import checkpoint_blocks, compile_blocks, shard
from unlearn.weights import Checkpoint, Initial, fill


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
    def lora_layers(self) -> Sequence[int]: ...
    @property
    def train(self) -> str | None: ...
    @property
    def checkpoint_activations(self) -> Literal["full", "selective", "none"] | None: ...
    @property
    def compile_blocks(self) -> bool: ...


class StartFlags(ModelFlags, Protocol):
    """The flags that decide which weights training starts from."""

    @property
    def fresh_weights(self) -> bool: ...


def master_dtype(config: ModelFlags) -> torch.dtype:
    """Of the model's weights in memory: float32 where they are trained, else what they compute in."""
    return torch.float32 if config.lora_rank == 0 else DTYPES[config.dtype]


def trained_model(config: ModelFlags, mesh: DeviceMesh | None) -> PreTrainedModel:
    """The model in training, on the meta device: adapters added (float32), blocks checkpointed, rows sharded."""
    model = empty_model(config.model, revision=config.revision, dtype=master_dtype(config))
    disable_dropout(model)
    if config.lora_rank > 0:
        assert config.lora_alpha is not None and config.lora_dropout is not None
        named = {"targets": config.lora_targets, "layers": config.lora_layers, "seed": config.seed}
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, **named)  # type: ignore[arg-type]
    elif config.train is not None:
        train_only(model, config.train)
    if config.checkpoint_activations != "none":
        checkpoint_blocks(model, config.checkpoint_activations or "full", config.lora_rank)
    if config.compile_blocks:
        compile_blocks(model)
    if mesh is not None:
        shard(model, mesh, compute=DTYPES[config.dtype])
    return model


def initial_values(config: StartFlags, model: PreTrainedModel) -> Initial:
    """Values that are not the checkpoint's: an adapter's, and with --fresh-weights of everything else too."""
    adapter = initial_adapters(model)
    if not config.fresh_weights:
        return adapter
    fresh = fresh_weights(config.model, config.seed, revision=config.revision)

    def value(name: str) -> Tensor:
        found = adapter(name)
        return fresh(name.replace(".base.", ".")) if found is None else found

    return value


def original_model(config: TrainConfig, mesh: DeviceMesh | None, needs: Sequence[Needs]) -> PreTrainedModel | None:
    """The frozen original of full training, on the meta device; None where no term of the loss needs it.

    It computes as the model in training does, so that both are equal before the first step: unsharded, from float32
    weights under autocast, which leaves the residual stream in float32.
    """
    if config.lora_rank > 0 or not reads_original(config, needs):
        return None
    return frozen_model(config, config.model, mesh, revision=config.revision, offload=config.offload_reference)


def frozen_model(
    config: TrainConfig, path: str, mesh: DeviceMesh | None, *, revision: str | None = None, offload: bool = False
) -> PreTrainedModel:
    """A model beside the one in training, on the meta device, that computes in the same precision."""
    dtype = master_dtype(config) if mesh is None else DTYPES[config.dtype]
    model = empty_model(path, revision=revision, dtype=dtype).requires_grad_(False)
    disable_dropout(model)
    if config.compile_blocks:
        compile_blocks(model, trained=False)
    if mesh is not None:
        shard(model, mesh, compute=DTYPES[config.dtype], offload=offload)
    return model


def optimizers_of(config: TrainConfig, model: PreTrainedModel) -> dict[str, Optimizer]:
    """The optimizers that the flags ask for; see `build_optimizers`."""
    return build_optimizers(
        model,
        optimizer=config.optimizer,
        adam_lr=config.adam_lr,
        sgd_lr=config.sgd_lr,
        muon_lr=config.muon_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        method=config.muon_method or "gram",
        floor=config.muon_floor or 0.0,
        qkv=config.muon_qkv or "fused",
    )


def method_parts(
    config: TrainConfig,
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    batches: Mapping[str, Batches],
    lens: Callable[[tuple[int, ...]], TunedLens],
    device: torch.device,
    teacher: Callable[[str], PreTrainedModel] = empty_model,
    tokens: Callable[[str], list[int]] = lambda text: [0] * len(text),
) -> Parts:
    """What the method may ask for; without an `original`, that is `model` with its adapters switched off.

    Args:
        teacher, tokens: see `Parts`; by default those of a run without weights and text.
    """
    before: Original = partial(without_adapters, model)
    if original is not None:
        before = partial(nullcontext, original)  # type: ignore[assignment]
    return Parts(
        model=model,
        device=device,
        original=before,
        batches=batches,
        lens=lens,
        seed=config.seed,
        tokens=tokens,
        fresh=lambda name: fresh_weights(config.model, config.seed, revision=config.revision)(name),
        teacher=teacher,
    )


def method_phases(config: TrainConfig, parts: Parts) -> list[Phase]:
    """What --method makes of these parts: its phases, or the one of its terms; both under any --latent-attack, and
    beside any --adversary."""
    module = method_module(config.method)
    found = (latent_attack(config, parts.model), adversary(config, parts.model, parts.device))
    opponents = [opponent for opponent in found if opponent is not None]
    for opponent in opponents:
        parts = replace(parts, original=opponent.suspended(parts.original))
    phases = module.phases(config, parts) if hasattr(module, "phases") else [Phase("", module.terms(config, parts))]
    return [replace(phase, terms=[_opposed(term, opponents) for term in phase.terms]) for phase in phases]


def _opposed(term: Term, opponents: Sequence[LatentAttack | Adversary]) -> Term:
    """The term, if it is a forget loss, with that taken against the opponents, the last of them outermost."""
    if term.name == "forget":
        for opponent in opponents:
            term = opponent.on(term)
    return term


def method_terms(config: TrainConfig, parts: Parts) -> list[Term]:
    """The terms of all phases."""
    return [term for phase in method_phases(config, parts) for term in phase.terms]


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The original of LoRA training: the model itself, with its adapters switched off."""
    with lora_disabled(model):
        yield model


def precision(config: ModelFlags, mesh: DeviceMesh | None, device: torch.device) -> Precision:
    """The precision of forward passes: autocast, unless sharding casts the weights."""
    compute = DTYPES[config.dtype]
    return autocast(master_dtype(config) if mesh is None else compute, compute, device)


def run_lens(config: TrainConfig, device: torch.device, layers: Iterable[int] | None) -> TunedLens:
    """The lens at `layers` (None: all) on every rank, with copies of the original's final norm and unembedding.

    Only these two parts of the model are read, in the dtype in which the lens is checked against them.
    """
    with fail_together():
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
        readout = empty_model(config.model, revision=config.revision, dtype=master_dtype(config))
        for part in (final_norm(readout), readout.get_output_embeddings()):
            fill(readout, checkpoint, device, part=part)
    return TunedLens.load(getattr(config, "lens", None) or "", readout, layers).to(DTYPES[config.dtype])
