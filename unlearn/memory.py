"""What a run will need, before it starts: the peak memory of one GPU by term, arithmetic, and time.

Everything follows from a model's shape and the run's flags; nothing is read but `config.json`. Terms are what is held
at the fullest moment of a step. `python -m unlearn plan --verify` runs the same step on tensors without data instead
(see `simulate.py`), and the formula is held to that.

Notation: P parameters, W ranks, S of them sharing one copy, c bytes of a computed number, T tokens of a micro-batch,
n target layers, D hidden size, V vocabulary.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from unlearn.block_memory import measured_blocks
from unlearn.config import TrainConfig
from unlearn.errors import UserError
from unlearn.lora import is_target
from unlearn.losses import CHUNK
from unlearn.methods.terms import Needs
from unlearn.model import blocks, blocks_prefix
from unlearn.optim.polar import flops
from unlearn.parameters import lowest_block, matching

GIB = 2**30
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
HEADROOM = 6.0  # GiB of a GPU that the context, NCCL's buffers and fragmentation take: 94.9 of a GH200, plan for 88
# For each kind of recomputation: numbers of size T D that one block keeps for its backward pass, and that exist while
# it is recomputed and differentiated. Simulated for GPT-NeoX; blocks of others are measured: see `block_memory`.
NEOX = {"full": (1.0, 30.0), "selective": (11.0, 20.0), "none": (18.0, 8.0)}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on.

    Attributes:
        parameters: of the whole model. matrices: of the matrices inside the blocks, Muon's share.
        block: parameters of the largest block. head: of the unembedding, V D. tied: whether it is the embedding too.
        targets: (outputs, inputs) of every linear layer inside the blocks that LoRA would adapt. orthogonalised: of
            every one that full training would give to Muon.
        trained, trained_matrices, trained_block, trained_head: what full training trains of the first four.
        lowest: the lowest block in which anything trains; -1: the embedding does.
        capped: whether its logits are soft-capped.
        in_block: for each kind of recomputation what one block keeps, and what its backward pass adds; see `NEOX`.
    """

    parameters: int
    matrices: int
    block: int
    head: int
    tied: bool
    hidden: int
    vocabulary: int
    depth: int
    targets: tuple[tuple[int, int], ...]
    orthogonalised: tuple[tuple[int, int], ...]
    trained: int
    trained_matrices: int
    trained_block: int
    trained_head: int
    lowest: int
    capped: bool
    in_block: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, model: PreTrainedModel, flags: TrainConfig) -> "Shape":
        """Read the sizes off a model, which may be on the meta device, and of what the flags train of it.

        Raises:
            UserError: see `parameters.matching`.
        """
        prefix = blocks_prefix(model)
        named = dict(model.named_parameters())
        inside = {name: p for name, p in named.items() if name.startswith(prefix) and p.ndim >= 2}
        pairs = {name: (p.shape[0], p.shape[1]) for name, p in inside.items() if p.ndim == 2}
        adapted = [name for name in pairs if is_target(model, name, flags.lora_targets, flags.lora_layers)]
        chosen = {name: named[name] for name in (named if flags.train is None else matching(model, flags.train))}
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        config: PretrainedConfig = model.config
        in_blocks = [list(block.parameters()) for block in blocks(model)]
        trained = {id(parameter) for parameter in chosen.values()}
        return cls(
            parameters=_size(named.values()),
            matrices=_size(inside.values()),
            block=max(map(_size, in_blocks)),
            head=head.numel(),
            trained=_size(chosen.values()),
            trained_matrices=_size(p for name, p in inside.items() if name in chosen),
            trained_block=max(_size(p for p in block if id(p) in trained) for block in in_blocks),
            trained_head=head.numel() if id(head) in trained else 0,
            lowest=lowest_block(model, adapted if flags.lora_rank else list(chosen)),
            tied=head is embedding,
            hidden=int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            depth=int(config.num_hidden_layers),
            targets=tuple(pairs[name] for name in adapted),
            orthogonalised=tuple(pairs[name] for name in pairs if name in chosen),
            capped=getattr(config, "final_logit_softcapping", None) is not None,
            in_block=NEOX if config.model_type == "gpt_neox" else measured_blocks(flags, config),
        )


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class Layout:
    """How many ranks there are, and how many of them share one copy of the model (1: every rank has all of it)."""

    world_size: int
    shard: int

    @classmethod
    def of(cls, config: TrainConfig, world_size: int, local_world_size: int) -> "Layout":
        """As `train.py` would lay the run out."""
        sizes = {"full": world_size, "replicate": 1, "hybrid": config.shard_size or local_world_size}
        return cls(world_size, max(1, sizes[config.shard_kind(world_size)]))


def terms(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> dict[str, float]:
    """Bytes of one GPU at the fullest moment of a step, by what they are for.

    That moment is either in the backward pass of a block, or where the retain loss reads the vocabulary: of the terms
    of these two, the fuller ones are given.

    Args:
        needs: of the terms of the loss, see `blank.needs_of`.
    """
    compute = DTYPE_BYTES[config.dtype]
    result = _states(config, shape, layout, needs)
    own = sum(term.bytes for term in needs)
    if own:
        result["the method's own"] = own
    if not _is_sharded(config, layout) and config.lora_rank == 0 and compute != 4:
        result["weights as autocast rounds them"] = shape.trained * compute  # it keeps those of trained ones
    result["activations"] = _activations(config, shape, needs) * compute
    block, vocabulary = one_block(config, shape, layout, needs), _vocabulary(config, shape, layout, needs)
    return result | max(block, vocabulary, key=lambda moment: sum(moment.values()))


def _is_sharded(config: TrainConfig, layout: Layout) -> bool:
    """Whether FSDP2 holds the model, be it on one rank."""
    return config.shard_kind(layout.world_size) != "replicate"


def _states(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> dict[str, float]:
    """Weights, gradients, optimizer states and the reference."""
    compute, ranks = DTYPE_BYTES[config.dtype], layout.shard
    trained, in_muon = shape.trained, shape.trained_matrices
    result = {"weights": 4 * shape.parameters / ranks}
    if config.lora_rank:
        trained = in_muon = sum(config.lora_rank * (outputs + inputs) for outputs, inputs in shape.targets)
        result["weights"] = (compute * shape.parameters + 4 * trained) / ranks
    if config.optimizer != "muon":
        in_muon = 0
    apart = bool(config.filter) or not _is_sharded(config, layout)  # each term's gradient is then summed by itself
    terms = min(2, len(needs)) if apart else 1
    result["gradients"] = 4 * trained * terms / ranks
    if "sign-mask" in config.filter:
        result["the retain gradient's mean"] = 4 * trained / ranks
    if "collapse" in config.filter:
        result["the forget gradient's mean"] = 4 * shape.trained_matrices / ranks
    if config.optimizer != "sgd":
        result["optimizer"] = (4 * in_muon + 8 * (trained - in_muon)) / ranks
    teacher = max((term.teacher for term in needs), default=0)
    if teacher:
        wide = not _is_sharded(config, layout) and config.lora_rank == 0
        result["teacher"] = (4 if wide else compute) * teacher / ranks
    if config.lora_rank == 0 and reads_original(config, needs) and not config.offload_reference:
        result["reference"] = (compute if _is_sharded(config, layout) else 4) * shape.parameters / ranks
    return result


def _checkpointing(config: TrainConfig) -> Literal["full", "selective", "none"]:
    """What is computed again; where a run has not chosen yet, all, which takes the least memory."""
    return config.checkpoint_activations or "full"


def reads_original(config: TrainConfig, needs: Sequence[Needs]) -> bool:
    """Whether the run reads the original: in its loss, or for its budgets."""
    return any(term.original for term in needs) or config.measures_damage


def _activations(config: TrainConfig, shape: Shape, needs: Sequence[Needs]) -> float:
    """Numbers that one micro-batch keeps for its backward pass: what blocks keep, and the original's streams."""
    kept, _ = shape.in_block[_checkpointing(config)]
    most = max((term.width * (kept * differentiated(term, shape) + term.kept + 3) for term in needs), default=3.0)
    return float(micro_tokens(config) * shape.hidden * most)


def reach(term: Needs, shape: Shape) -> int:
    """How many blocks a term runs."""
    return shape.depth if term.deepest is None else term.deepest


def differentiated(term: Needs, shape: Shape) -> int:
    """How many blocks the backward pass of a term goes through."""
    return max(0, reach(term, shape) - max(0, shape.lowest))


def one_block(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> dict[str, float]:
    """Bytes of one block's backward pass: its recomputation, and the weights that FSDP2 has gathered for it."""
    compute = DTYPE_BYTES[config.dtype]
    _, beside = shape.in_block[_checkpointing(config)]
    tokens = micro_tokens(config) * max((term.width for term in needs), default=1.0)
    result = {"one block's backward pass": float(beside * tokens * shape.hidden * compute)}
    if _is_sharded(config, layout):
        gradient = 0 if config.lora_rank else compute + 4  # as computed, and in float32 for the reduction
        result["gathered blocks"] = float(shape.block * 2 * compute + shape.trained_block * gradient)
    return result


def _vocabulary(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> dict[str, float]:
    """Bytes of a loss over the vocabulary: a chunk of logits, and the unembeddings that it reads.

    A chunk's numbers take 26 bytes where it is compared with the original's (21 where the unembedding has no gradient),
    16 for a cross-entropy, 8 through a lens; where they are soft-capped, as Gemma 2's, 29, 20 and 26.
    """
    compute, chunk = DTYPE_BYTES[config.dtype], min(CHUNK, micro_tokens(config))
    above = [term for term in needs if term.deepest is None]
    compared = any((term.original or term.teacher) and not term.apart for term in above)
    beside = 29 if shape.capped else 21 if config.lora_rank else 26
    alone, through = (20, 26) if shape.capped else (16, 8)
    each = beside if compared else alone if above else through if any(term.bytes for term in needs) else 0
    result = {"a chunk over the vocabulary": float(each * chunk * shape.vocabulary)}
    if above and not compared and config.lora_rank and _is_sharded(config, layout):
        result["gathered unembedding and embedding"] = float(2 * shape.head * compute)
    if above and not config.lora_rank:
        gathered, gradient = shape.head * (2 if compared else 1) * compute, shape.trained_head * (compute + 4)
        result["unembedding and its gradient"] = float(gathered + gradient)
    return result


def micro_tokens(config: TrainConfig) -> int:
    """Most tokens of one forward pass on one rank."""
    return config.micro_tokens or (config.micro_batch or 1) * config.seq_len


def flops_per_step(config: TrainConfig, shape: Shape, needs: Sequence[Needs]) -> float:
    """Multiply-adds, times two, of one optimizer step over all ranks, at full windows.

    Per token and parameter of the blocks: 2 forward, 2 backward and 2 more where it trains, 2 for the recomputation, 2
    for the original; backward and recomputation end at the lowest block that trains; the unembedding's products
    likewise; what a method computes beside the models; and Muon's iterations. Attention itself is left out (a few per
    cent).
    """
    tokens, block = config.batch * config.seq_len, shape.matrices / shape.depth
    total = orthogonalisation(config, shape)
    for term in needs:
        recomputes = _checkpointing(config) == "full"
        again = 2 * term.backward * block * differentiated(term, shape) if recomputes else 0.0
        total += tokens * (flops_per_token(config, shape, term) + again)
    return total


def flops_per_token(config: TrainConfig, shape: Shape, term: Needs, *, backward: bool = True) -> float:
    """Of one term of the loss, differentiated or only measured, without recomputation; see `flops_per_step`."""
    run, through = reach(term, shape), differentiated(term, shape)
    block, head = shape.matrices / shape.depth, shape.head if term.deepest is None else 0
    forward = 2 * term.forward * (block * run + head) + term.flops
    if not backward:
        return forward
    back = 2 * block * through + 2 * head
    if config.lora_rank == 0:
        back += 2 * shape.trained_matrices * run / shape.depth + (2 * shape.trained_head if head else 0)
    return forward + term.backward * back


def orthogonalisation(config: TrainConfig, shape: Shape) -> float:
    """Floating-point operations of Muon on every matrix that it gets, once."""
    if config.optimizer != "muon":
        return 0.0
    matrices = list(shape.orthogonalised)
    if config.lora_rank:
        matrices = [pair for m, n in shape.targets for pair in ((config.lora_rank, n), (m, config.lora_rank))]
    method, floor = config.muon_method or "gram", config.muon_floor or 0.0
    return float(sum(flops(rows, columns, method, floor=floor) for rows, columns in matrices))


def available_gib(device: torch.device) -> float:
    """Memory that one rank may plan with: of its GPU, less `HEADROOM`; on the CPU its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB - HEADROOM
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return host / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Neighbour:
    """A run like the planned one but for one change, and its peak in GiB."""

    change: str
    peak_gib: float


def neighbours(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> list[Neighbour]:
    """Runs that differ in one thing and need less, the most helpful first."""
    here = peak_gib(config, shape, layout, needs)
    tried: list[Neighbour] = []

    def consider(change: str, flags: Mapping[str, object], other: Layout = layout) -> None:
        changed = dataclasses.replace(config, **flags)  # type: ignore[arg-type]
        tried.append(Neighbour(change, peak_gib(changed, shape, other, needs)))

    if micro_tokens(config) > config.seq_len:
        key = "micro_tokens" if config.micro_tokens else "micro_batch"
        consider(
            f"--{key.replace('_', '-')} {1 if key == 'micro_batch' else config.seq_len}",
            {key: 1 if key == "micro_batch" else config.seq_len},
        )
    if config.checkpoint_activations == "none":
        consider("--checkpoint-activations selective", {"checkpoint_activations": "selective"})
    if config.checkpoint_activations in ("none", "selective"):
        consider("--checkpoint-activations full", {"checkpoint_activations": "full"})
    if layout.shard > 1 or config.lora_rank == 0:
        more = Layout(2 * layout.world_size, 2 * layout.shard)
        consider(f"{more.world_size} GPUs", {"shard": config.shard or "full"}, more)
    if config.lora_rank == 0:
        lora: dict[str, object] = {
            "lora_rank": 16,
            "shard": None,
            "shard_size": None,
            "offload_reference": False,
            "output": None,
        }
        lora |= {"lora_alpha": None, "lora_dropout": None}
        if config.optimizer == "muon":
            lora |= {"adam_lr": None, "muon_qkv": None}
        lora["train"] = None
        consider("--lora-rank 16", lora, Layout(layout.world_size, 1))
    return sorted((found for found in tried if found.peak_gib < here), key=lambda found: found.peak_gib)


def peak_gib(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> float:
    """The sum of all terms, in GiB."""
    return sum(terms(config, shape, layout, needs).values()) / GIB


def check_rank(lora_rank: int, shape: Shape) -> None:
    """Raise if adapters have a higher rank than any matrix that they adapt: more of it changes nothing but the cost."""
    highest = max((min(pair) for pair in shape.targets), default=0)
    if lora_rank > highest > 0:
        raise UserError(
            f"expected --lora-rank of at most {highest}, the full rank of the largest adapted matrix; found "
            f"{lora_rank}: lower it, or train in full without it"
        )


def check_reach(shape: Shape, needs: Sequence[Needs]) -> None:
    """Raise if a term of the loss reads nothing that depends on a trained parameter."""
    for term in needs:
        if term.deepest is not None and not differentiated(term, shape) and shape.lowest >= 0:
            where = f"in block {shape.lowest}" if shape.lowest < shape.depth else "above all blocks"
            raise UserError(
                f"expected to train something below layer {term.deepest}, the deepest that one of the losses reads; "
                f"found that the lowest is {where}: change --train, --lora-layers or --layers"
            )


def check_fits(config: TrainConfig, shape: Shape, layout: Layout, needs: Sequence[Needs], limit_gib: float) -> None:
    """Raise unless the planned peak is within `limit_gib`, naming the largest term and what would help."""
    found = terms(config, shape, layout, needs)
    peak = sum(found.values()) / GIB
    if peak <= limit_gib:
        return
    largest = max(found, key=lambda name: found[name])
    better = next(iter(neighbours(config, shape, layout, needs)), None)
    remedy = f"try {better.change} ({better.peak_gib:.1f} GiB)" if better else "use a smaller model or more GPUs"
    raise UserError(
        f"expected a run that fits into {limit_gib:.1f} GiB; found a planned peak of {peak:.1f} GiB, most of it "
        f"{largest} ({found[largest] / GIB:.1f} GiB): {remedy}"
    )
