"""Assemble an unlearning run from its flags, say what it will do, and export what it made."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.config import TrainConfig
from unlearn.data import Batches, Corpus, check_examples, read_corpus
from unlearn.distributed import fail_together, is_main, world_size
from unlearn.files import atomic_folder
from unlearn.lens import TunedLens
from unlearn.lora import adapters, add_lora, merge_lora, save_adapter
from unlearn.model import cast_parameters, disable_dropout, load_config, load_model, load_tokenizer, save_model
from unlearn.objectives.lens import Coefficients, LensObjective, Reference, without_adapters
from unlearn.optim.build import build_optimizers, roles
from unlearn.precision import DTYPES, autocast


@dataclass(frozen=True)
class Unlearning:
    """Everything that a run trains with."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    objective: LensObjective
    optimizers: dict[str, Optimizer]
    steps: int
    autocast: Callable[[], AbstractContextManager[object]]


def build(config: TrainConfig, device: torch.device) -> Unlearning:
    """Read model, lens and corpora, and put them together.

    Raises:
        UserError: anything that the flags name is missing, damaged or does not fit the rest.
    """
    config.check_depth(int(load_config(config.model, revision=config.revision).num_hidden_layers))
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    batches = _batches(config, tokenizer)
    steps = next(iter(batches.values())).steps
    compute = DTYPES[config.dtype]
    master = compute if config.lora_rank > 0 else torch.float32
    model = load_model(config.model, revision=config.revision, dtype=master, device=device)
    disable_dropout(model)
    lens = TunedLens.load(config.lens or "", model, config.layers if "forget" in batches else ()).to(compute)
    reference = _adapt(config, model, compute)
    context = autocast(master, compute, device)
    objective = LensObjective(
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
        micro_batch=config.micro_batch,
        autocast=context,
    )
    optimizers = build_optimizers(
        model,
        optimizer=config.optimizer,
        adam_lr=config.adam_lr,
        muon_lr=config.muon_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    return Unlearning(config, model, tokenizer, objective, optimizers, steps, context)


def _batches(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Batches]:
    """The global batches of each corpus whose coefficient is not 0: as many windows of one as of the other."""
    used = {"forget": config.remove_coef != 0.0, "retain": config.retain_coef != 0.0}
    corpora = {name: _read(config, tokenizer, name) for name, needed in used.items() if needed}
    assert config.examples is not None
    for corpus in corpora.values():
        check_examples(corpus, config.examples, config.batch)
    leading = next(iter(corpora.values()))
    total = min(config.examples, len(leading.windows)) * config.epochs
    settings = {"examples": config.examples, "total": total, "batch": config.batch, "seed": config.seed}
    return {name: Batches(corpus, **settings, tag=name) for name, corpus in corpora.items()}


def _read(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, which: str) -> Corpus:
    return read_corpus(
        getattr(config, which),
        tokenizer,
        seq_len=config.seq_len,
        column=getattr(config, f"{which}_column"),
        template=getattr(config, f"{which}_template"),
    )


def _adapt(config: TrainConfig, model: PreTrainedModel, compute: torch.dtype) -> Reference:
    """Make the model trainable as the flags say; return the way to its original."""
    if config.lora_rank == 0:
        original = copy.deepcopy(model).requires_grad_(False)
        cast_parameters(original, compute)
        return lambda: nullcontext(original)
    assert config.lora_alpha is not None and config.lora_dropout is not None
    add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, seed=config.seed)
    return partial(without_adapters, model)


def describe(run: Unlearning) -> str:
    """What the run will do, in a few lines, before its first step."""
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    lines = [f"trainable parameters {trainable:,} of {total:,}" + _lora_line(run)]
    for name, batches in (("forget", run.objective.forget), ("retain", run.objective.retain)):
        if batches is not None:
            corpus = batches.corpus
            lines.append(
                f"{name}: unique examples {batches.unique:,} (windows of at most {run.config.seq_len:,} tokens; "
                f"the corpus has {len(corpus.windows):,} windows of {corpus.documents:,} documents), windows trained "
                f"on {batches.total:,}, effective epochs {batches.total / batches.unique:.2f}"
            )
    lines.append(
        f"optimizer steps {run.steps:,} of global batch {run.config.batch} "
        f"({world_size()} rank(s), micro-batch {run.config.micro_batch})"
    )
    return "\n".join(lines + _optimizer_lines(run))


def _lora_line(run: Unlearning) -> str:
    count = len(adapters(run.model))
    return f" (LoRA rank {run.config.lora_rank} on {count} layers)" if count else " (full training)"


def _optimizer_lines(run: Unlearning) -> list[str]:
    parts = roles(run.model)
    matrices = "muon" if "muon" in run.optimizers else "adamw"
    rows = [
        ("matrices of the blocks", parts.matrices, matrices),
        ("embeddings", parts.embeddings, "adamw"),
        ("norms and biases", parts.vectors, "adamw"),
    ]
    return [
        f"{optimizer}: {len(group)} {role}, {sum(p.numel() for p in group.values()):,} parameters"
        for role, group, optimizer in rows
        if group
    ]


def finish(run: Unlearning, folder: Path) -> None:
    """Write `adapter/`, then turn the live model into what is exported (adapters merged, weights in --dtype) and write
    `model/`. After this, the live model and the exported one are the same."""
    with fail_together():
        if run.config.lora_rank > 0 and is_main():
            with atomic_folder(folder / "adapter") as temporary:
                save_adapter(run.model, temporary, run.config.model)
        merge_lora(run.model)
        cast_parameters(run.model, DTYPES[run.config.dtype])
        if is_main():
            with atomic_folder(folder / "model") as temporary:
                save_model(run.model, run.tokenizer, temporary)
