"""A step without data: the peak memory of the true shape, on any machine with a CPU.

The model is built, sharded and trained for two micro-batches on fake tensors (shapes and dtypes only) in a fake
process group of as many ranks as the run will have. Every storage that the step creates is counted while it lives,
FSDP2's gathering and freeing included. What is not in it: the CUDA context, the allocator's fragmentation, and buffers
of the communication library.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from unlearn import lora
from unlearn.blank import blank_lens, full_windows, needs_of
from unlearn.building import (
    method_parts,
    method_terms,
    optimizers_of,
    original_model,
    precision,
    trained_model,
)
from unlearn.config import TrainConfig
from unlearn.filters import hooks_of
from unlearn.live_bytes import as_the_kernel_does, counting
from unlearn.memory import Layout
from unlearn.methods.terms import Loss, Parts, Term
from unlearn.sharding import shard_mesh
from unlearn.trainer import clip_gradients, gradients
from unlearn.weights import local_rows, materialise

CPU = torch.device("cpu")


@contextmanager
def fake_ranks(world_size: int) -> Iterator[FakeTensorMode]:
    """A process group of `world_size` ranks of which only this one exists, and a mode without data to go with it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()


Found = TypeVar("Found")  # what can be pickled
Method = Callable[[TrainConfig, Parts], list[Term]]


def simulated_peak(config: TrainConfig, layout: Layout, method: Method = method_terms) -> int:
    """Peak bytes of one rank over an optimizer step of two micro-batches a loss term, at full windows.

    The step is the run's own code: forward and backward passes and clipping, beside the optimizers' states. It runs in
    a process of its own, which ends without tearing anything down: collecting tensors without data, once their process
    group is gone, may crash the interpreter (torch 2.13).

    Raises:
        RuntimeError: that process failed; its traceback is above.
    """
    return in_a_process(lambda: _simulate(config, layout, method))


def in_a_process(simulate: Callable[[], Found]) -> Found:
    """What `simulate` returns in a forked process; see `simulated_peak`."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
        sender.send(simulate())
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        found: Found = receiver.recv()
        return found
    except EOFError as error:
        raise RuntimeError("the simulation ended early; what it printed says why") from error
    finally:
        process.join()


def _simulate(config: TrainConfig, layout: Layout, method: Method) -> int:
    """`simulated_peak` in this process."""
    lora.dropped = as_the_kernel_does  # in a process of its own
    with fake_ranks(layout.world_size) as fake:
        size = layout.shard if config.shard == "hybrid" else None
        mesh = shard_mesh(config.shard_kind(layout.world_size), size, CPU)  # before the mode: it holds real ranks
        model, original = trained_model(config, mesh), original_model(config, mesh, needs_of(config))
        windows = full_windows(config, layout.world_size)
        with fake, counting() as counter:
            materialise(model, CPU)
            if original is not None:
                materialise(original, CPU)
            lens = partial(blank_lens, config, device=CPU)
            terms = method(config, method_parts(config, model, original, windows, lens, CPU))
            if config.offload_reference and original is not None:
                counter.live -= sum(local_rows(p)[0].nbytes for p in original.parameters())  # in host memory
            held = optimizer_states(config, model)
            model.train()
            loss = Loss(terms, precision(config, mesh, CPU), [] if original is None else [original])
            kept = hooks_of(config, model).state()
            unfiltered = (lambda term, trained: None) if config.filter else None
            gradients(model, loss, 1, 2, unfiltered)  # the second step: the retain coefficient may start at 0
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            clip_gradients(parameters, 1.0, torch.ones(()))
            del held, kept
            return counter.peak


def optimizer_states(config: TrainConfig, model: torch.nn.Module) -> list[Any]:
    """The optimizers, with the states that AdamW would make in its first step."""
    built = optimizers_of(config, model)  # type: ignore[arg-type]
    adamw = built.get("adamw")
    groups = adamw.param_groups if adamw is not None else []
    moments = [torch.zeros_like(parameter) for group in groups for parameter in group["params"] for _ in range(2)]
    return [built, moments]
