"""Memory: activation checkpointing, compilation and FSDP2, as free functions over a plain model.

Applied in this order, to a model that may still be on the meta device:

1. `checkpoint_blocks`: keep only some of a block's numbers for the backward pass and recompute the rest.
2. `compile_blocks` (optional): one compiled graph per block, inside which FSDP2 never looks.
3. `shard`: every block, the embedding, the final norm and the unembedding become units of FSDP2.

Communication of a sharded step (https://arxiv.org/abs/2304.11277, and torch's `fully_shard`): before a unit computes,
its rows are all-gathered in the compute dtype inside its shard group and freed again afterwards; in backward once more,
and the unit's gradient is reduce-scattered in float32. Under hybrid sharding the scattered gradients are then
all-reduced across the replicas, once an optimizer step. FSDP2 overlaps the gathering of the next unit with the
computation of the current one; nothing is prefetched by hand, because a forward pass may end below the top and would
leave a gathered block behind.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from unlearn.distributed import world_size
from unlearn.errors import UserError
from unlearn.model import blocks, final_norm
from unlearn.weights import local_rows

Kind = Literal["full", "hybrid", "replicate"]
Rows = TypeVar("Rows")


def shard_mesh(kind: Kind, shard_size: int | None, device: torch.device) -> DeviceMesh | None:
    """The mesh of a sharded model: ("shard",), or ("replicate", "shard") for hybrid; None for replicated weights.

    Args:
        shard_size: ranks that hold one copy between them, hybrid only; by default the ranks of one node.

    Raises:
        UserError: `shard_size` does not divide the number of ranks, or leaves nothing to replicate or to shard.
    """
    if kind == "replicate":
        return None
    if not dist.is_initialized():  # one process outside torchrun: a group of its own, which needs no port
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if kind == "full":
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if size < 2 or size >= world_size() or world_size() % size != 0:
        raise UserError(
            f"expected --shard hybrid with a --shard-size (default: the ranks of a node) of 2 or more that divides "
            f"{world_size()} ranks into two groups or more; found {size}: choose another or use --shard full"
        )
    return init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("replicate", "shard"))


def checkpoint_blocks(model: PreTrainedModel, kind: Literal["full", "selective"], lora_rank: int = 0) -> None:
    """Recompute blocks in the backward pass instead of keeping what they computed; the same numbers, to the bit.

    Only `forward` is replaced: hooks, FSDP2's among them, stay outside and are called once.

    Args:
        kind: full keeps each block's input; selective also what matrix products and attention computed, so that only
            the rest is computed again.
        lora_rank: of the adapters; their products back from it are as large as the base layer's, and cheap.
    """
    contexts = {}
    if kind == "selective":
        keep = partial(_keeps_products, lora_rank)
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, keep)}
    for block in blocks(model):
        block.forward = partial(_checkpointed, block.forward, contexts)


def _keeps_products(lora_rank: int, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation.namespace != "aten":
        return CheckpointPolicy.PREFER_RECOMPUTE
    name = operation.overloadpacket.__name__
    product = name in ("mm", "addmm") and args[-1].shape[0] != lora_rank
    kept = product or (name.startswith("_scaled_dot_product") and not name.endswith("backward"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], contexts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # The adapters' dropout is a hash of the row keys, so there is no random state to restore.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)


def compile_blocks(model: PreTrainedModel, *, trained: bool = True) -> None:
    """Compile each block's forward: one graph for all blocks, and another once the length of windows changes.

    Args:
        trained: leave it as it is while the model is not in training: measurements come in texts of every length, and
            their graphs would count towards the few that torch keeps.
    """
    for block in blocks(model):
        compiled = torch.compile(block.forward)
        block.forward = partial(_compiled_in_training, block, compiled, block.forward) if trained else compiled


def _compiled_in_training(
    block: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return (compiled if block.training else plain)(*args, **kwargs)


def shard(model: PreTrainedModel, mesh: DeviceMesh, *, compute: torch.dtype, offload: bool = False) -> None:
    """Shard a model's rows over `mesh`, in place.

    Args:
        compute: dtype in which units are gathered and computed; gradients are reduced in float32 whatever it is.
        offload: keep the shards in host memory and copy each to the GPU when it is needed.
    """
    masters = {parameter.dtype for parameter in model.parameters()}
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    if masters == {compute} == {torch.float32}:
        policy = MixedPrecisionPolicy()
    offloading = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    wrap = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offloading)
    for block in blocks(model):
        wrap(block)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:  # tied weights stay with the root, which gathers them once for both
        wrap(embedding)
        wrap(head)
        assert isinstance(embedding, FSDPModule)
        embedding.set_unshard_in_backward(False)  # its gradient does not read it
    wrap(final_norm(model))
    wrap(model, reshard_after_forward=True)  # what is left to the root too, so that `reshard` may free it


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to `model`."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free every weight that is still gathered: those of the root after a forward pass that ended early, or that no
    backward pass followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_reducing_last(model: nn.Module, micro_batches: Iterable[Rows], *, ends_step: bool = True) -> Iterator[Rows]:
    """Go through micro-batches; under hybrid sharding only the last one's backward all-reduces across the replicas.

    FSDP2 keeps the sum of what the others scattered, in place of the gradient it will become. The reduce-scatter
    inside a replica stays with every micro-batch: without it each rank would keep a whole float32 gradient.

    Args:
        ends_step: whether the last of them has the last backward pass of the optimizer step.
    """
    all_of_them = list(micro_batches)
    for number, rows in enumerate(all_of_them, 1):
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(ends_step and number == len(all_of_them))
        yield rows


def averaged_over(parameter: nn.Parameter) -> int:
    """Over how many ranks FSDP2 took the mean of this parameter's gradient: 1 for a plain one."""
    return parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of the whole gradient, float64 [], however it is sharded; parameters without a gradient count as 0.

    Summed in float64, so that it is the same float32 number in any layout.
    """
    local = [local_rows(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]
    square = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in local]).square().sum()
    if isinstance(parameters[0], DTensor):
        dist.all_reduce(square, group=parameters[0].device_mesh.get_group("shard"))
    return square.sqrt()
