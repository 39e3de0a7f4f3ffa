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
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from step import TRUE
from torch import Tensor

from unlearn.building import original_model
from unlearn.config import TrainConfig
from unlearn.data import Batches, Rows
from unlearn.lora import set_dropout_rows
from unlearn.losses import kl_divergence, uniform_per_token
from unlearn.memory import GIB, Layout, Shape, peak_gib
from unlearn.model import empty_model, residual_streams
from unlearn.objectives.lens import LensObjective
from unlearn.simulate import simulated_peak

WHOLE = 1 << 40  # a chunk that holds every token


class JointGraph(LensObjective):
    """The lens's graph kept beside the model's, all layers at once, instead of two stages."""

    def _forget(self, batches: Batches, rows: Rows, step: int, coefficient: float) -> dict[str, Tensor]:
        set_dropout_rows(self.model, rows.keys)
        with self.autocast():
            streams = residual_streams(self.model, rows.input_ids, self.layers)
        shares = [self.loss_of(rows.at_real(streams[layer]), layer) for layer in self.layers]
        total = torch.stack(shares).sum() / batches.tokens(step)
        (coefficient * total).backward()
        return {"tokens": torch.tensor(rows.tokens), "forget_loss": total.detach()}

    def loss_of(self, stream: Tensor, layer: int) -> Tensor:
        """Sum over tokens of one layer's loss."""
        return uniform_per_token(self.lens.hidden(stream, layer), self.lens.unembedding)[0].sum()


class StoredGradients(LensObjective):
    """Every layer's dL/dh computed first, and kept until one backward starts from all of them."""

    def _forget(self, batches: Batches, rows: Rows, step: int, coefficient: float) -> dict[str, Tensor]:
        set_dropout_rows(self.model, rows.keys)
        with self.autocast():
            streams = residual_streams(self.model, rows.input_ids, self.layers)
        leaves = self.stored(streams, batches, rows, step, coefficient)
        torch.autograd.backward([*streams.values()], [leaf.grad for leaf in leaves])
        return {"tokens": torch.tensor(rows.tokens), "forget_loss": torch.tensor(0.0)}

    def stored(
        self, streams: Mapping[int, Tensor], batches: Batches, rows: Rows, step: int, coefficient: float
    ) -> list[Tensor]:
        """Detached streams with their gradients."""
        leaves = {layer: stream.detach().requires_grad_() for layer, stream in streams.items()}
        for layer, leaf in leaves.items():
            (coefficient * self.layer_loss(leaf, layer, rows, batches, step)[0]).backward()
        return list(leaves.values())


class WholeLogits(JointGraph):
    """[tokens, V] float32 log-probabilities of every layer at once: the documented out-of-memory."""

    def loss_of(self, stream: Tensor, layer: int) -> Tensor:
        logits = self.lens.hidden(stream, layer) @ self.lens.unembedding.T
        return -torch.log_softmax(logits.float(), dim=-1).mean(dim=-1).sum() / math.log(logits.shape[-1])


class OneBackward(StoredGradients):
    """Both terms' losses first, one backward for both."""

    def terms(self, step: int) -> Iterator[Mapping[str, Tensor | float]]:
        remove, retain = self.coefficients.at(step)
        assert self.forget is not None and self.retain is not None
        device = self.lens.unembedding.device
        pairs = zip(self.forget.micro_batches(step, device), self.retain.micro_batches(step, device), strict=True)
        for forget, retained in pairs:
            streams = residual_streams(self.model, forget.input_ids, self.layers)
            leaves = self.stored(streams, self.forget, forget, step, remove)
            losses: list[Tensor] = []
            with mock.patch.object(Tensor, "backward", lambda loss, kept=losses: kept.append(loss)):
                self._retain_kl(self.retain.tokens(step), retained, retain)
            torch.autograd.backward([*streams.values(), *losses], [*(leaf.grad for leaf in leaves), None])
        yield {"tokens": torch.tensor(0.0)}


def same_fields(kind: type[LensObjective]) -> Callable[[LensObjective], LensObjective]:
    """Make an objective of another class out of one, with the same parts."""
    return lambda objective: kind(**{f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)})


def rows(config: TrainConfig, layout: Layout) -> Iterator[tuple[str, Callable[[], float]]]:
    """(what was changed, a function that simulates it)."""

    def simulate(other: TrainConfig = config, change: Any = lambda objective: objective) -> float:
        return simulated_peak(other, layout, change) / GIB

    def patched(target: str, value: Any) -> float:
        with mock.patch(target, value):
            return simulate()

    def whole_kl(*given: Any, **named: Any) -> Any:
        return kl_divergence(*given, **named, chunk=WHOLE)

    yield "this design", simulate
    yield "all logits of all layers at once", lambda: simulate(change=same_fields(WholeLogits))
    yield "lens in chunks, joint graph", lambda: simulate(change=same_fields(JointGraph))
    yield "all layers' gradients kept", lambda: simulate(change=same_fields(StoredGradients))
    yield (
        "a whole copy of the original on every GPU",
        lambda: patched("unlearn.simulate.original_model", lambda other, mesh: original_model(other, None)),
    )
    yield "one backward for both terms", lambda: simulate(change=same_fields(OneBackward))
    yield "float32 compute", lambda: simulate(dataclasses.replace(config, dtype="fp32"))
    yield "KL over all tokens at once", lambda: patched("unlearn.objectives.lens.kl_divergence", whole_kl)
    yield "no activation checkpointing", lambda: simulate(dataclasses.replace(config, checkpoint_activations=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TRUE))
        config = TrainConfig(
            model=folder, optimizer="muon", layers=tuple(range(1, 33)), micro_batch=arguments.micro_batch
        )
        layout = Layout(4, 4)
        print(f"{'formula':44}{peak_gib(config, Shape.of(empty_model(folder)), layout):8.1f} GiB", flush=True)
        for name, simulate in rows(config, layout):
            if arguments.only in name:
                started = time.monotonic()
                print(f"{name:44}{simulate():8.1f} GiB   ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
