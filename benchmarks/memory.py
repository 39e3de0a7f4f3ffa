"""What each part of the memory design is worth: the peak of one GPU with that part taken away.

    python benchmarks/memory.py

The true shape (GPT-NeoX, 6.9 B parameters, 4 GPUs, 4 x 2,048 tokens a GPU, 32 target layers, Muon, KL retain loss),
simulated without data as `python -m unlearn plan --verify` does: no GPU is needed, about two minutes a row.
"""

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from step import TRUE
from torch import Tensor

from unlearn.batches import Rows
from unlearn.blank import needs_of
from unlearn.building import method_terms, original_model
from unlearn.config import TrainConfig, configure
from unlearn.losses import kl_divergence
from unlearn.memory import GIB, Layout, Shape, peak_gib
from unlearn.methods import lens as lens_method
from unlearn.methods.terms import Cost, Numbers, Parts, Plain, Source, Term
from unlearn.model import empty_model, residual_streams
from unlearn.simulate import simulated_peak

WHOLE = 1 << 40  # a chunk that holds every token


def joint_graph(config: Any, parts: Parts) -> list[Term]:
    """The lens's graph kept beside the model's, all layers at once, instead of two stages."""
    forget, retain = lens_method.terms(config, parts)
    read_off = lens_method.ReadOff(config, parts, 0)

    def cost(rows: Rows) -> Cost:
        streams = residual_streams(parts.model, rows.input_ids, config.layers)
        return Plain(
            torch.stack([read_off.layer_loss(rows, streams[layer], layer)[0] for layer in config.layers]).sum()
        )

    return [dataclasses.replace(forget, cost=cost), retain]


def whole_logits(config: Any, parts: Parts) -> list[Term]:
    """[tokens, V] float32 log-probabilities of every layer at once: the documented out-of-memory."""

    def per_token(hidden: Tensor, unembedding: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        logits = hidden @ unembedding.T
        losses = -torch.log_softmax(logits.float(), dim=-1).mean(dim=-1) / math.log(logits.shape[-1])
        return losses, torch.zeros_like(losses)

    lens_method.uniform_per_token = per_token  # type: ignore[assignment]  # in the simulation's own process
    return joint_graph(config, parts)


@dataclass(frozen=True)
class Stored:
    """Every layer's dL/dh computed first, and kept until one backward starts from all of them."""

    read_off: lens_method.ReadOff
    rows: Rows
    streams: Mapping[int, Tensor]

    def leaves(self, weight: float) -> list[Tensor]:
        """Detached streams with their gradients."""
        found = []
        for layer, stream in self.streams.items():
            leaf = stream.detach().requires_grad_()
            (weight * self.read_off.layer_loss(self.rows, leaf, layer)[0]).backward()
            found.append(leaf)
        return found

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        gradients = [leaf.grad for leaf in self.leaves(weight)]
        torch.autograd.backward([*self.streams.values()], gradients)
        return torch.tensor(0.0), {}


def stored_gradients(config: Any, parts: Parts) -> list[Term]:
    """See `Stored`."""
    forget, retain = lens_method.terms(config, parts)
    read_off = lens_method.ReadOff(config, parts, 0)

    def cost(rows: Rows) -> Cost:
        return Stored(read_off, rows, residual_streams(parts.model, rows.input_ids, config.layers))

    return [dataclasses.replace(forget, cost=cost), retain]


@dataclass(frozen=True)
class Pair:
    """A micro-batch of forget rows and one of retain rows."""

    forget: Rows
    retain: Rows

    @property
    def keys(self) -> Tensor:
        return self.forget.keys

    @property
    def tokens(self) -> int:
        return self.forget.tokens + self.retain.tokens


@dataclass(frozen=True)
class Pairs:
    """Both corpora's micro-batches side by side."""

    forget: Source
    retain: Source

    def micro_batches(self, step: int, device: torch.device) -> Iterator[Pair]:
        both = (source.micro_batches(step, device) for source in (self.forget, self.retain))
        return (Pair(*pair) for pair in zip(*both, strict=True))

    def tokens(self, step: int) -> int:
        """See `unlearn.methods.terms.Source`."""
        return self.forget.tokens(step) + self.retain.tokens(step)


@dataclass(frozen=True)
class Both:
    """The costs of two terms, differentiated by one backward."""

    stored: Stored
    plain: Plain

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        gradients = [leaf.grad for leaf in self.stored.leaves(weight)]
        torch.autograd.backward([*self.stored.streams.values(), weight * self.plain.value], [*gradients, None])
        return torch.tensor(0.0), {}


def one_backward(config: Any, parts: Parts) -> list[Term]:
    """Both terms' losses first, one backward for both."""
    forget, retain = stored_gradients(config, parts)

    def cost(pair: Pair) -> Cost:
        return Both(forget.cost(pair.forget), retain.cost(pair.retain))  # type: ignore[arg-type]

    return [Term("both", Pairs(forget.batches, retain.batches), cost)]  # type: ignore[arg-type]


def rows(config: TrainConfig, layout: Layout) -> Iterator[tuple[str, Callable[[], float]]]:
    """(what was changed, a function that simulates it)."""

    def simulate(other: TrainConfig = config, method: Any = method_terms) -> float:
        return simulated_peak(other, layout, method) / GIB

    def patched(target: str, value: Any) -> float:
        with mock.patch(target, value):
            return simulate()

    def whole_kl(*given: Any, **named: Any) -> Any:
        return kl_divergence(*given, **named, chunk=WHOLE)

    yield "this design", simulate
    yield "all logits of all layers at once", lambda: simulate(method=whole_logits)
    yield "lens in chunks, joint graph", lambda: simulate(method=joint_graph)
    yield "all layers' gradients kept", lambda: simulate(method=stored_gradients)
    yield (
        "a whole copy of the original on every GPU",
        lambda: patched(
            "unlearn.simulate.original_model", lambda other, mesh, needs: original_model(other, None, needs)
        ),
    )
    yield "one backward for both terms", lambda: simulate(method=one_backward)
    yield "float32 compute", lambda: simulate(dataclasses.replace(config, dtype="fp32"))
    yield "KL over all tokens at once", lambda: patched("unlearn.methods.retain.kl_divergence", whole_kl)
    yield "no activation checkpointing", lambda: simulate(dataclasses.replace(config, checkpoint_activations="none"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TRUE))
        config = configure(
            model=folder, optimizer="muon", layers=tuple(range(1, 33)), micro_batch=arguments.micro_batch
        )
        layout = Layout(4, 4)
        planned = peak_gib(config, Shape.of(empty_model(folder), config), layout, needs_of(config))
        print(f"{'formula':44}{planned:8.1f} GiB", flush=True)
        for name, simulate in rows(config, layout):
            if arguments.only in name:
                started = time.monotonic()
                print(f"{name:44}{simulate():8.1f} GiB   ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
