"""Assemble a run of train.py from its flags, and say what it will do."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.batches import Batches, check_examples
from unlearn.blank import needs_of
from unlearn.budget import Budget, budget_of
from unlearn.building import (
    frozen_model,
    initial_values,
    method_parts,
    method_phases,
    optimizers_of,
    original_model,
    precision,
    run_lens,
    trained_model,
)
from unlearn.choices import settled
from unlearn.config import TrainConfig
from unlearn.corpus import Corpus, read_corpus
from unlearn.cost import Passes, passes_of_step
from unlearn.distributed import fail_together, is_main, world_size
from unlearn.errors import UserError
from unlearn.files import files_hash
from unlearn.filters import hooks_of
from unlearn.lens import TunedLens
from unlearn.lens_readings import encode_prompts
from unlearn.lora import adapters
from unlearn.memory import Layout, Shape, available_gib, check_fits, check_rank, check_reach
from unlearn.methods.terms import Hooks, Loss, Needs, Parts, Phase
from unlearn.model import (
    empty_model,
    load_config,
    load_tokenizer,
)
from unlearn.model_config import check_windows
from unlearn.optim.build import assignment
from unlearn.precision import Precision
from unlearn.run.preflight import check_apart, settings_hashes, tensors_hash
from unlearn.seeding import generator
from unlearn.sharding import shard_mesh
from unlearn.weights import Checkpoint, fill

Teachers = list[tuple[PreTrainedModel, Checkpoint]]  # a frozen model each, and its weights


@dataclass(frozen=True)
class Unlearning:
    """Everything that a run trains with; before `fill_models` the models have no memory, and there is no optimizer.

    Attributes:
        config: the flags, with what they left open settled. chosen: a line about each of these.
        teachers: other frozen models that the method asked for. identity: digests of all that is read.
        precision: of forward passes. shape: the model's sizes. filters: the hooks of --filter. budget:
            of --stop-at, where it measures.
    """

    config: TrainConfig
    chosen: list[str]
    shape: Shape
    model: PreTrainedModel
    original: PreTrainedModel | None
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    teachers: Teachers
    parts: Parts
    phases: list[Phase]
    precision: Precision
    filters: Hooks
    budget: Budget | None
    identity: dict[str, str]
    optimizers: dict[str, Optimizer]

    @property
    def loss(self) -> Loss:
        """Of the first phase."""
        return self.loss_of(self.phases[0])

    def loss_of(self, phase: Phase) -> Loss:
        """Of a phase."""
        terms = phase.terms
        if self.config.filter:  # it compares the forget gradient with what it has seen of the retain gradient
            terms = sorted(terms, key=lambda term: term.name == "forget")
        frozen = _frozen(self.original, self.teachers)
        return Loss(terms, self.precision, frozen, lambda step: self.passes(phase, step).as_numbers())

    def hooks_of(self, phase: Phase) -> Hooks:
        """Of a phase: its own, those of its terms, then those of --filter and --stop-at."""
        hooks = phase.hooks
        for term in phase.terms:
            hooks = hooks.then(term.hooks)
        hooks = hooks.then(self.filters)
        return hooks if self.budget is None else hooks.then(self.budget.hooks())

    def passes(self, phase: Phase, step: int) -> Passes:
        """What a step of a phase costs."""
        weights = Loss(phase.terms).weights(step, self.steps_of(phase))
        return passes_of_step(self.config, self.shape, phase.terms, step, weights)

    def steps_of(self, phase: Phase) -> int:
        """Optimizer steps of a phase."""
        return self._batches.steps if phase.steps is None else phase.steps

    def state(self) -> dict[str, Tensor]:
        """What the phases' hooks keep from step to step, by name; the models must have their weights."""
        kept = {f"filter.{name}": value for name, value in self.filters.state().items()}
        for phase in self.phases:
            named = [("", phase.hooks), *((f"{term.name}.", term.hooks) for term in phase.terms)]
            kept |= {
                f"{phase.name}.{own}{name}": value for own, hooks in named for name, value in hooks.state().items()
            }
        return kept

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(map(self.steps_of, self.phases))

    @property
    def _batches(self) -> Batches:
        return next(iter(self.parts.batches.values()))


MeshOf = Callable[[TrainConfig], DeviceMesh | None]


def assemble(config: TrainConfig, device: torch.device, mesh_of: MeshOf | None = None) -> Unlearning:
    """Read all that the method asks for but the models' weights, and look for every mistake in what the flags name.

    Args:
        mesh_of: gives the mesh of a layout, where an earlier run may have had the same: one more would cost groups of
            ranks that nobody frees.

    Raises:
        UserError: anything is missing, damaged or does not fit the rest; or the run cannot fit into memory.
    """
    model_config = load_config(config.model, revision=config.revision)
    config.check_depth(int(model_config.num_hidden_layers))
    config.check_blocks(int(model_config.num_hidden_layers))
    needs = needs_of(config)
    config, shape, chosen = _check_memory(config, needs, device)
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    with fail_together():
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
    mesh = mesh_of(config) if mesh_of else shard_mesh(config.shard_kind(world_size()), config.shard_size, device)
    model, original = trained_model(config, mesh), original_model(config, mesh, needs)
    identity = {"model": files_hash(checkpoint.paths()), **settings_hashes(checkpoint.folder)}
    batches = Corpora(config, tokenizer)
    parts, teachers = _parts(config, model, original, batches, tokenizer, mesh, device, identity)
    phases = method_phases(config, parts)
    encode_prompts(tokenizer, getattr(config, "prompts", ()), model_config)  # mistakes show before the first step
    check_windows(model_config, {corpus.name: corpus.windows for corpus in batches.read.values()})
    check_apart(batches.read)
    identity |= {f"{name} corpus": corpus.sha256() for name, corpus in batches.read.items()}
    computing = precision(config, mesh, device)
    found = Unlearning(
        config,
        chosen,
        shape,
        model,
        original,
        checkpoint,
        tokenizer,
        teachers,
        parts,
        phases,
        computing,
        hooks_of(config, model),
        budget_of(config, parts, computing, _frozen(original, teachers)),
        identity,
        {},
    )
    _check_phases(found)
    return found


def _frozen(original: PreTrainedModel | None, teachers: Teachers) -> list[PreTrainedModel]:
    """The models beside the one in training."""
    return [*([original] if original is not None else []), *(teacher for teacher, _ in teachers)]


def _parts(
    config: TrainConfig,
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    batches: Mapping[str, Batches],
    tokenizer: PreTrainedTokenizerBase,
    mesh: DeviceMesh | None,
    device: torch.device,
    identity: dict[str, str],
) -> tuple[Parts, Teachers]:
    """What the method may ask for, and the teachers that it will have asked for; either adds to the identity."""
    teachers: Teachers = []

    def lens(layers: tuple[int, ...]) -> TunedLens:
        found = run_lens(config, device, layers)
        identity["lens"] = tensors_hash(dict(found.translators.named_parameters()))
        return found

    def teacher(path: str) -> PreTrainedModel:
        found = _teacher(config, path, tokenizer, mesh)
        identity[f"teacher {path}"] = files_hash(found[1].paths())
        teachers.append(found)
        return found[0]

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return method_parts(config, model, original, batches, lens, device, teacher, tokens), teachers


def _teacher(
    config: TrainConfig, path: str, tokenizer: PreTrainedTokenizerBase, mesh: DeviceMesh | None
) -> tuple[PreTrainedModel, Checkpoint]:
    """A frozen model without memory, and its weights; raises `UserError` if it reads text in other tokens."""
    with fail_together():
        checkpoint = Checkpoint.open(path)
        if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"expected a teacher with the tokenizer of {config.model}; found another in {path}: choose another one"
            )
    return frozen_model(config, path, mesh), checkpoint


def _check_phases(run: Unlearning) -> None:
    """Raise unless the text is enough for every phase."""
    for phase in run.phases:
        most = min((one.steps for one in run.parts.batches.values()), default=0)
        if run.steps_of(phase) > most:
            raise UserError(
                f"expected at most {most:,} optimizer steps, for which there are batches, in the phase {phase.name}; "
                f"found {run.steps_of(phase):,}: raise --epochs or --steps"
            )


def build(config: TrainConfig, device: torch.device) -> Unlearning:
    """Assemble a run, read the models' weights, and make the optimizers; see `assemble` and `fill_models`."""
    run = assemble(config, device)
    fill_models(run)
    return run


def fill_models(run: Unlearning) -> None:
    """Read the models' weights, and make the optimizers of the one in training.

    Raises:
        UserError: the weights are damaged.
    """
    config, device = run.config, run.parts.device
    with fail_together():
        fill(run.model, run.checkpoint, device, initial=initial_values(config, run.model))
        if run.original is not None:
            weights = torch.device("cpu") if config.offload_reference else device  # whose parameters alone FSDP2 brings
            fill(run.original, run.checkpoint, weights, buffers=device, initial=initial_values(config, run.original))
        for teacher, weights_of in run.teachers:
            fill(teacher, weights_of, device)
    run.optimizers.update(optimizers_of(config, run.model))


class Corpora(dict[str, Batches]):
    """The global batches of each corpus that a method asks for, read in that moment: as many windows of the later ones
    as of the first. `mix` is half `forget`, half `retain`.

    Attributes:
        read: the corpora themselves.
    """

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.read: dict[str, Corpus] = {}

    def __missing__(self, name: str) -> Batches:
        config, corpus = self.config, self._read(name)
        assert config.examples is not None
        first = next(iter(self.values())).corpus if self else corpus
        examples = min(config.examples, len(first.windows))
        batch = min(config.batch, examples)
        check_examples(corpus, config.examples, batch)
        self[name] = Batches(
            corpus,
            examples=config.examples,
            total=examples * config.epochs if config.steps is None else batch * config.steps,
            batch=batch,
            seed=config.seed,
            tag=name,
            micro_batch=config.micro_batch,
            micro_tokens=config.micro_tokens,
        )
        return self[name]

    def _read(self, name: str) -> Corpus:
        if name == "mix":
            assert self.config.examples is not None
            both = {part: self._read(part) for part in ("forget", "retain")}
            return mixed(both, self.config.examples, self.config.seed)
        self.read[name] = _read(self.config, self.tokenizer, name)
        return self.read[name]


def mixed(corpora: Mapping[str, Corpus], examples: int, seed: int) -> Corpus:
    """As many windows of each corpus, `examples` of all: of each the first ones that it alone would give."""
    share = min(examples // len(corpora), *(len(part.windows) for part in corpora.values()))
    chosen = [
        (part, index)
        for tag, part in corpora.items()
        for index in torch.randperm(len(part.windows), generator=generator(seed, tag, "choice"))[:share].tolist()
    ]
    windows, masks = [part.windows[index] for part, index in chosen], None
    if any(part.masks is not None for part in corpora.values()):
        masks = [part.mask(index) for part, index in chosen]
    name = " and ".join(part.name for part in corpora.values())
    return Corpus(name, documents=sum(part.documents for part in corpora.values()), windows=windows, masks=masks)


def _check_memory(
    config: TrainConfig, needs: Sequence[Needs], device: torch.device
) -> tuple[TrainConfig, Shape, list[str]]:
    """Refuse a run that cannot fit, before anything is read but the model's configuration; gives the flags as settled,
    the model's sizes, and what was chosen."""
    shape = Shape.of(empty_model(config.model, revision=config.revision), config)
    check_rank(config.lora_rank, shape)
    check_reach(shape, needs)
    per_node, limit = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), available_gib(device)
    config, chosen = settled(config, shape, needs, world_size(), per_node, limit)
    check_fits(config, shape, Layout.of(config, world_size(), per_node), needs, limit)
    return config, shape, chosen


def _read(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, which: str) -> Corpus:
    return read_corpus(
        getattr(config, which),
        tokenizer,
        seq_len=config.seq_len,
        column=getattr(config, f"{which}_column"),
        column_flag=f"--{which}-column",
        template=getattr(config, f"{which}_template"),
        mask=config.forget_mask if which == "forget" else None,
        context=config.forget_context,
    )


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
    return "\n".join(lines + run.chosen + assignment(run.model, run.optimizers))


def _micro(config: TrainConfig) -> str:
    if config.micro_tokens is not None:
        return f"micro-batches of at most {config.micro_tokens:,} tokens"
    return f"micro-batch {config.micro_batch}"


def _lora_line(run: Unlearning) -> str:
    count = len(adapters(run.model))
    return f" (LoRA rank {run.config.lora_rank} on {count} layers)" if count else " (full training)"
