"""Ranks, the process group's lifetime, and the few collectives that everybody uses.

Everything here also works without torchrun: one process is rank 0 of 1, and every collective is then a no-op.
"""

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn.device import choose_device, describe
from unlearn.errors import OnEveryRank, OutOfMemory, UserError

# A stopped rank makes the others fail after this, instead of hanging for ever: up to the end of the first step, which
# includes loading and compiling, and from then on.
TIMEOUT, STEP_TIMEOUT = timedelta(minutes=30), timedelta(minutes=10)
# What gloo says on a rank where another one has died, or has not answered in time.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
FULL = ("CUDA out of memory", "can't allocate memory")  # what torch says where memory has run out
LOOPBACK = "127.0.0.1"
# Read when CUDA and NCCL start. FSDP2's buffers come and go in many sizes, which leaves holes in segments of one size
# (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf); a collective
# beside large products gets no processor on a stream of equal priority.
CUDA_SETTINGS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_HIGH_PRIORITY": "1"}
PLACE = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")  # what torchrun tells a rank

Value = TypeVar("Value")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


@contextmanager
def process_group(asked: str | None = None) -> Iterator[torch.device]:
    """Join torchrun's process group for the length of the block (NCCL on CUDA, gloo on CPU); yield this rank's device,
    which rank 0 says.

    Outside torchrun nothing is joined, unless sharding makes a group of one. The group is left when the block ends,
    unless it ends in an error that may be this rank's alone: leaving would make the others fail, and speak, before it
    does; or wait with NCCL for ranks that are inside a collective, while torchrun sees no failure.

    Args:
        asked: see `choose_device`.
    """
    device = choose_device(asked)
    if device.type == "cuda":
        for name, value in CUDA_SETTINGS.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(device)
        _repeatable()
    outermost = not dist.is_initialized()
    if outermost and "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _join(backend)
    if outermost and is_main():
        print(f"device: {describe(device)}, {world_size()} rank(s)", flush=True)
    try:
        yield device
    except RuntimeError as error:
        if any(word in str(error) for word in FULL):
            raise OutOfMemory(
                f"expected enough memory for this run; found none left ({str(error).splitlines()[0]}): choose a "
                "smaller --micro-batch or --batch-tokens, or more GPUs"
            ) from error
        if not any(word in str(error) for word in LOST):
            raise
        raise UserError(
            f"expected all {world_size()} ranks to be there until the end; found one lost "
            f"({str(error).splitlines()[0]!r}): see what it said, and start the same command again"
        ) from error
    finally:
        failed = sys.exception()
        alone = isinstance(failed, Exception) and not (isinstance(failed, UserError) and failed.everywhere)
        if outermost and dist.is_initialized() and not (alone and world_size() > 1):
            dist.destroy_process_group()


def _join(backend: str) -> None:
    """Join the group that torchrun's variables describe.

    Raises:
        UserError: one of them is missing or wrong, or the port is taken.
    """
    place = {name: os.environ.get(name, "") for name in PLACE}
    odd = next((f"{name}={value!r}" for name, value in place.items() if not value), None)
    odd = odd or next((f"{name}={place[name]!r}" for name in PLACE[1:] if not place[name].isdecimal()), None)
    if odd is None and not (0 < int(place["MASTER_PORT"]) < 65536 and int(place["RANK"]) < int(place["WORLD_SIZE"])):
        odd = " ".join(f"{name}={place[name]}" for name in PLACE[1:])
    if odd is not None:
        raise UserError(
            f"expected {', '.join(PLACE)} as torchrun sets them; found {odd}: start with torchrun or launch/node.sh, "
            "or unset RANK to run one process"
        )
    own_store = place["MASTER_ADDR"] == LOOPBACK and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **(_loopback_store() if own_store else {}))
    except (OSError, dist.DistNetworkError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"expected to meet the other ranks at {place['MASTER_ADDR']}:{place['MASTER_PORT']}; found {reason!r}: "
            "choose another MASTER_PORT, which nothing else uses"
        ) from error


def _repeatable() -> None:
    """The same bits from the same run on a GPU: no kernel that adds in the order of arrival, and float32 where it says
    so (https://docs.pytorch.org/docs/stable/notes/randomness.html)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, not bits
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _loopback_store() -> dict[str, Any]:
    """The store in which ranks on one machine find each other, and this rank's place: torch's listens everywhere."""
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    port, serves = int(os.environ["MASTER_PORT"]), place["rank"] == 0
    listening = socket.create_server((LOOPBACK, port), backlog=place["world_size"]).detach() if serves else None
    store = dist.TCPStore(LOOPBACK, port, is_master=serves, timeout=TIMEOUT, master_listen_fd=listening)
    return place | {"store": store}


def set_timeout(timeout: timedelta) -> None:
    """Let every collective from now on fail if it takes longer than `timeout`."""
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_true(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on every rank."""
    failures = torch.full((), 0.0 if condition else 1.0, device=device)
    return all_sum(failures).item() == 0.0


@contextmanager
def main_first() -> Iterator[None]:
    """Let one rank of each node run the block before the others do: what it puts into a cache, they read.

    If it fails there, the others still try, and fail in the same way, instead of waiting for ever.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def sum_gradients(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = 32 << 20) -> None:
    """Sum the gradients of replicated parameters over all ranks in place, in flat buckets of about `bucket_bytes`.

    Every rank must pass the same parameters in the same order. A parameter without a gradient on this rank counts as
    zero (a rank may have had no rows in a short batch). Sums, not means: each rank's loss is already divided by the
    token count of the whole global batch.
    """
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:  # on one rank too: an optimizer skips None but decays and counts on zeros
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (size >= bucket_bytes or bucket[0].dtype != parameter.dtype):
            _sum_bucket(bucket)
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[torch.nn.Parameter]) -> None:
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
    flat = all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


@contextmanager
def fail_together() -> Iterator[None]:
    """Let a failure inside the block on any rank fail every rank, with the same sentence, instead of hanging the rest.

    Raises:
        OnEveryRank: the first failing rank's, on every rank.
    """
    sentence: str | None = f"rank {rank()} failed; its traceback says why"
    sentences: list[str | None] = []
    try:
        yield
        sentence = None
    except UserError as error:
        sentence = str(error)
    finally:  # whatever else it was leaves with its own traceback, once the other ranks know
        sentences = gather(sentence)
    for found in sentences:
        if found is not None:
            raise OnEveryRank(found)


def gather(value: Value) -> list[Value]:
    """Every rank's `value`, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Value] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Value) -> Value:
    """Rank 0's `value`."""
    return gather(value)[0]
