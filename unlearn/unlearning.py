"""Assemble an unlearning run from its flags, say what it will do, and export what it made."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.building import master_dtype, method_parts, original_model, precision, trained_model
from unlearn.config import TrainConfig
from unlearn.data import Batches, Corpus, check_examples, read_corpus
from unlearn.distributed import fail_together, is_main, world_size
from unlearn.files import absolute_model, files_hash
from unlearn.lens import TunedLens
from unlearn.lens_readings import Stage, encode_prompts, read_prompts, write_stage
from unlearn.lora import adapters, initial_adapters, merge_lora, save_adapter
from unlearn.memory import Layout, Shape, available_gib, check_fits, check_rank
from unlearn.methods import lens as lens_method
from unlearn.methods.terms import Loss, Parts
from unlearn.model import (
    cast_parameters,
    empty_model,
    final_norm,
    load_config,
    load_tokenizer,
    save_model,
)
from unlearn.model_config import check_windows
from unlearn.optim.build import assignment, build_optimizers
from unlearn.precision import DTYPES
from unlearn.preflight import check_apart, settings_hashes, tensors_hash
from unlearn.sharding import is_sharded, reshard, shard_mesh
from unlearn.weights import Checkpoint, fill, shared_folder


@dataclass(frozen=True)
class Inputs:
    """What a run reads, but for the weights in training."""

    tokenizer: PreTrainedTokenizerBase
    batches: dict[str, Batches]
    lens: TunedLens
    checkpoint: Checkpoint
    identity: dict[str, str]  # digests of it all


@dataclass(frozen=True)
class Unlearning:
    """Everything that a run trains with."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: Parts
    loss: Loss
    optimizers: dict[str, Optimizer]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return next(iter(self.parts.batches.values())).steps


def read_inputs(config: TrainConfig, device: torch.device) -> Inputs:
    """Read corpora and lens, and look for every mistake in what the flags name.

    Raises:
        UserError: anything is missing, damaged or does not fit the rest; or the run cannot fit into memory.
    """
    model_config = load_config(config.model, revision=config.revision)
    config.check_depth(int(model_config.num_hidden_layers))
    _check_memory(config, device)
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    batches = _batches(config, tokenizer)
    check_windows(model_config, {one.corpus.name: one.corpus.windows for one in batches.values()})
    encode_prompts(tokenizer, config.prompts, model_config)  # what is wrong with them shows before the first step
    check_apart({name: of_name.corpus for name, of_name in batches.items()})
    lens = _lens(config, device, config.layers if "forget" in batches else ())
    with fail_together():
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
    identity = {
        "model": files_hash(checkpoint.paths()),
        **settings_hashes(checkpoint.folder),
        "lens": tensors_hash(dict(lens.translators.named_parameters())),
    }
    identity |= {f"{name} corpus": of_name.corpus.sha256() for name, of_name in batches.items()}
    return Inputs(tokenizer, batches, lens, checkpoint, identity)


def build(config: TrainConfig, device: torch.device, inputs: Inputs | None = None) -> Unlearning:
    """Put a run together, reading the model's weights, and `inputs` if they are not given.

    Raises:
        UserError: see `read_inputs`; or the weights are damaged.
    """
    inputs = inputs or read_inputs(config, device)
    mesh = shard_mesh(config.shard_kind(world_size()), config.shard_size, device)
    model, original = trained_model(config, mesh), original_model(config, mesh)
    with fail_together():
        fill(model, inputs.checkpoint, device, initial=initial_adapters(model))
        if original is not None:
            weights = torch.device("cpu") if config.offload_reference else device
            fill(original, inputs.checkpoint, weights, buffers=device)  # FSDP2 brings the offloaded weights alone
    parts = method_parts(config, model, original, inputs.lens, inputs.batches)
    optimizers = build_optimizers(
        model,
        optimizer=config.optimizer,
        adam_lr=config.adam_lr,
        muon_lr=config.muon_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        method=config.muon_method or "gram",
        floor=config.muon_floor,
        qkv=config.muon_qkv or "fused",
    )
    loss = Loss(
        lens_method.terms(config, parts), precision(config, mesh, device), [] if original is None else [original]
    )
    return Unlearning(config, model, inputs.tokenizer, parts, loss, optimizers)


def _check_memory(config: TrainConfig, device: torch.device) -> None:
    """Refuse a run that cannot fit, before anything is read but the model's configuration."""
    model = empty_model(config.model, revision=config.revision)
    layout = Layout.of(config, world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    shape = Shape.of(model, config.lora_targets)
    check_rank(config.lora_rank, shape)
    check_fits(config, shape, layout, available_gib(device))


def _batches(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Batches]:
    """The global batches of each corpus whose coefficient is not 0: as many windows of one as of the other."""
    used = {"forget": config.remove_coef != 0.0, "retain": config.retain_coef != 0.0}
    corpora = {name: _read(config, tokenizer, name) for name, needed in used.items() if needed}
    assert config.examples is not None
    for corpus in corpora.values():
        check_examples(corpus, config.examples, config.batch)
    leading = next(iter(corpora.values()))
    total = min(config.examples, len(leading.windows)) * config.epochs
    settings = {name: getattr(config, name) for name in ("examples", "batch", "seed", "micro_batch", "micro_tokens")}
    settings["total"] = total
    return {name: Batches(corpus, **settings, tag=name) for name, corpus in corpora.items()}


def _read(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, which: str) -> Corpus:
    return read_corpus(
        getattr(config, which),
        tokenizer,
        seq_len=config.seq_len,
        column=getattr(config, f"{which}_column"),
        column_flag=f"--{which}-column",
        template=getattr(config, f"{which}_template"),
    )


def _lens(config: TrainConfig, device: torch.device, layers: Iterable[int] | None) -> TunedLens:
    """The lens at `layers` (None: all) on every rank, with copies of the original's final norm and unembedding.

    Only these two parts of the model are read, in the dtype in which the lens is checked against them.
    """
    with fail_together():
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
        readout = empty_model(config.model, revision=config.revision, dtype=master_dtype(config))
        for part in (final_norm(readout), readout.get_output_embeddings()):
            fill(readout, checkpoint, device, part=part)
    return TunedLens.load(config.lens or "", readout, layers).to(DTYPES[config.dtype])


def announce(run: Unlearning) -> None:
    """Print what the run will do, once for all ranks, before its first step."""
    if is_main():
        print(describe(run), flush=True)


def describe(run: Unlearning) -> str:
    """What the run will do, in a few lines."""
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    lines = [f"trainable parameters {trainable:,} of {total:,}" + _lora_line(run)]
    for name, batches in run.parts.batches.items():
        corpus = batches.corpus
        lines.append(
            f"{name}: unique examples {batches.unique:,} (windows of at most {run.config.seq_len:,} tokens; "
            f"the corpus has {len(corpus.windows):,} windows of {corpus.documents:,} documents), windows trained "
            f"on {batches.total:,}, effective epochs {batches.total / batches.unique:.2f}"
        )
    lines.append(
        f"optimizer steps {run.steps:,} of global batch {run.config.batch} ({world_size()} rank(s), "
        f"{_micro(run.config)}, {run.config.shard_kind(world_size())} weights)"
    )
    return "\n".join(lines + assignment(run.model, run.optimizers))


def _micro(config: TrainConfig) -> str:
    if config.micro_tokens is not None:
        return f"micro-batches of at most {config.micro_tokens:,} tokens"
    return f"micro-batch {config.micro_batch}"


def _lora_line(run: Unlearning) -> str:
    count = len(adapters(run.model))
    return f" (LoRA rank {run.config.lora_rank} on {count} layers)" if count else " (full training)"


def export_bytes(run: Unlearning) -> int:
    """Size of what `finish` writes, but for the adapter."""
    return sum(parameter.numel() for parameter in run.model.parameters()) * DTYPES[run.config.dtype].itemsize


def read_lens(run: Unlearning, folder: Path, stage: Stage) -> None:
    """Read --prompts at every layer of the live model, for `folder`/lens.json. Every rank must call it.

    The lens is in memory at all layers for no longer than this takes, and nothing random is drawn.
    """
    config, training = run.config, run.model.training
    if not config.prompts:
        return
    lens = _lens(config, next(run.model.parameters()).device, None)
    run.model.eval()
    prompts = read_prompts(run.model, lens, run.tokenizer, config.prompts, stage, run.loss.precision)
    reshard(run.model)  # the passes ended early: the root's tied embedding would stay gathered, and no longer sharded
    run.model.train(training)
    with fail_together():
        if is_main():
            write_stage(folder, lens, str(config.lens), prompts, stage)


def finish(run: Unlearning, folder: Path) -> None:
    """Write `adapter/`, then turn the live model into what is exported (adapters merged, weights in --dtype) and write
    `model/`, in place of what an earlier attempt left. After this, the live model and the exported one are the same,
    and --prompts are read in it."""
    if run.config.lora_rank > 0:
        with shared_folder(folder / "adapter", replace=True) as temporary:
            save_adapter(run.model, temporary, absolute_model(run.config.model))
        merge_lora(run.model)
    dtype = DTYPES[run.config.dtype]
    if not is_sharded(run.model):  # a sharded model computes with its weights rounded as they are exported
        cast_parameters(run.model, dtype)
    with shared_folder(folder / "model", replace=True) as temporary:
        save_model(run.model, run.tokenizer, temporary, dtype)
    read_lens(run, folder, "after")
