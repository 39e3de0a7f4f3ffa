"""What an unlearning method is: a few terms, each of which says what one micro-batch of one corpus costs.

    loss = sum over terms of weight(s) * mean,   s = step / (steps - 1)

A term's mean is over the tokens of the *global* batch: `rows.mean(x)` divides by their number, so a method never does.
The trainer goes through the micro-batches, sets precision and dropout, calls `backward` and sums over ranks: a method
sees none of it.

How to add one: write a file in this folder, with a dataclass `Flags` and `terms(flags, parts) -> list[Term]`, and add
its name to METHODS. A method of several losses one after the other has `phases(flags, parts) -> list[Phase]` instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.batches import Batches, Rows
from unlearn.lens import TunedLens
from unlearn.precision import Precision

Original = Callable[[], AbstractContextManager[PreTrainedModel]]
Numbers = dict[str, Tensor]  # to log: this rank's shares, [] each; their sums over micro-batches and ranks are logged


@dataclass(frozen=True)
class Parts:
    """What a method may ask for; what it does not ask for is never read.

    Attributes:
        model: the model in training. device: where its batches will be.
        original: the model before unlearning, for the length of a block: a frozen copy, or without its adapters.
        batches: the global batches of each corpus, `forget` and `retain`.
        lens: gives the tuned lens at some layers.
        seed: of the run.
        tokens: gives the token ids of a text, without what the tokenizer would put around it.
        fresh: gives the whole initial value of a parameter by its name, float32, on the CPU: what the model began with
            before it learned anything.
        teacher: gives another frozen model, by a local folder or hub name; its weights become part of what makes the
            run this run. Its numbers may be read only once the run trains.
    """

    model: PreTrainedModel
    device: torch.device
    original: Original
    batches: Mapping[str, Batches]
    lens: Callable[[tuple[int, ...]], TunedLens]
    seed: int
    tokens: Callable[[str], list[int]]
    fresh: Callable[[str], Tensor]
    teacher: Callable[[str], PreTrainedModel]


class Cost(Protocol):
    """This rank's share of a term for one micro-batch, not yet differentiated."""

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        """Add `weight` times the gradient to `.grad`, unless the weight is 0.

        Returns:
            the share, [] float32, and what to log beside it.
        """
        ...


class Source(Protocol):
    """Where the micro-batches of a term come from."""

    def micro_batches(self, step: int, device: torch.device) -> Iterator[Rows]:
        """This rank's micro-batches of one optimizer step, equally many on every rank."""
        ...

    def tokens(self, step: int) -> int:
        """Real tokens of one optimizer step, over all ranks."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a term needs, for the plan of memory and arithmetic.

    Attributes:
        deepest: the deepest residual stream that it reads; None if it reads the unembedding above all of them.
        original: whether it runs the original too. kept: how many of its residual streams [B, S, D] it keeps. apart:
            whether it reads the original's logits, if it does, at another time than the model's.
        width: tokens that it puts through the model at once, padding included, for each of a micro-batch.
        bytes: of what it holds over the whole run beside the models, computed in the run's dtype.
        teacher: parameters of a teacher, if it asks for one.
        flops: floating-point operations a token beside the models'.
        more_forward, more_backward: passes over its tokens beyond one through the model, and one through the original
            and a teacher each.
    """

    deepest: int | None = None
    original: bool = False
    kept: int = 0
    apart: bool = False
    width: float = 1.0
    bytes: float = 0.0
    flops: float = 0.0
    teacher: int = 0
    more_forward: float = 0.0
    more_backward: float = 0.0

    @property
    def forward(self) -> float:
        """Forward passes over each of its tokens."""
        return 1.0 + self.original + (self.teacher > 0) + self.more_forward

    @property
    def backward(self) -> float:
        """Backward passes over each of its tokens."""
        return 1.0 + self.more_backward


@dataclass(frozen=True)
class Hooks:
    """What a method does within an optimizer step beside its loss, alike on all ranks.

    A parameter that is sharded has a DTensor for a gradient, of which `unlearn.weights.local_rows` are here.

    Attributes:
        filter: called after a term's gradient is summed over ranks and found finite, before it is added to the other
            terms' and clipped, with the term's name and the trained parameters by name: may change `.grad` in place.
            Not called where the term's weight is 0. The terms' gradients are then held apart, which costs one more.
        after_step: called with the number of the phase's steps done, once the optimizers have stepped.
        stop: called after that with the same and the step's numbers, summed over ranks, to which it may add what is to
            be logged; says why the phase ends here, or None.
        state: what the hooks keep from step to step, by name: written to checkpoints, and read back in place. Called
            when the model has its weights.
    """

    filter: Callable[[str, Mapping[str, nn.Parameter]], None] | None = None
    after_step: Callable[[int], None] | None = None
    stop: Callable[[int, dict[str, float]], str | None] | None = None
    state: Callable[[], Mapping[str, Tensor]] = dict

    def then(self, other: "Hooks") -> "Hooks":
        """These, and then the other ones; the first that has a reason ends the phase."""

        def filter(term: str, trained: Mapping[str, nn.Parameter]) -> None:
            for one in (self.filter, other.filter):
                if one is not None:
                    one(term, trained)

        def after_step(done: int) -> None:
            for one in (self.after_step, other.after_step):
                if one is not None:
                    one(done)

        def stop(done: int, numbers: dict[str, float]) -> str | None:
            found = [one(done, numbers) for one in (self.stop, other.stop) if one is not None]
            return next((why for why in found if why), None)

        return Hooks(
            filter=None if self.filter is other.filter is None else filter,
            after_step=None if self.after_step is other.after_step is None else after_step,
            stop=None if self.stop is other.stop is None else stop,
            state=lambda: {**self.state(), **other.state()},
        )


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        name: what the log calls it: `<name>_loss`.
        batches: of its corpus.
        cost: what one micro-batch costs; called with gradients enabled where the weight is not 0.
        weight: of s, which rises from 0 at the first step to 1 at the last.
        needs: for the plan of memory.
        hooks: within the steps of its phase.
    """

    name: str
    batches: Source
    cost: Callable[[Rows], Cost]
    weight: Callable[[float], float] = lambda s: 1.0
    needs: Needs = Needs()
    hooks: Hooks = Hooks()


@dataclass(frozen=True)
class Phase:
    """A part of a run, with a loss of its own and its optimizers' state from nothing.

    Attributes:
        name: what the log calls it; "" in a run of one phase.
        terms: of its loss, whose weights see s go from 0 to 1 within the phase.
        steps: optimizer steps, at most as many as its batches have; None: all of them. 0: only `begin`.
        begin: called before its first step, and not when a run goes on within it: it may change weights that are
            trained (noise, rows drawn anew), alike on all ranks.
        hooks: within its steps.
    """

    name: str
    terms: Sequence[Term]
    steps: int | None = None
    begin: Callable[[PreTrainedModel], None] = lambda model: None
    hooks: Hooks = Hooks()


@dataclass(frozen=True)
class Loss:
    """The sum of some terms, and what it takes to run them.

    Attributes:
        precision: of forward passes; what a cost computes in its backward pass is outside.
        frozen: models beside the one in training; the trainer frees what a forward pass left gathered of them.
        cost: what to log of the cost of a step, which is given, by name.
    """

    terms: Sequence[Term]
    precision: Precision = nullcontext
    frozen: Sequence[nn.Module] = ()
    cost: Callable[[int], Mapping[str, float]] = lambda step: {}

    def weights(self, step: int, steps: int) -> list[float]:
        """Of the terms at an optimizer step."""
        return [term.weight(step / max(1, steps - 1)) for term in self.terms]


@dataclass(frozen=True)
class Plain:
    """A cost with an ordinary graph behind it: `value`, [] float32."""

    value: Tensor
    numbers: Numbers = field(default_factory=dict)

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        """See `Cost`."""
        if weight != 0.0 and self.value.requires_grad:
            (weight * self.value).backward()
        return self.value.detach(), self.numbers


@dataclass(frozen=True)
class OnStreams:
    """A sum of losses of residual streams, differentiated in two stages.

    What lies behind the streams is frozen, so the loss of each one and its gradient dL/dh are computed on the stream
    *detached*, in the moment in which the one backward through the model comes by. The same gradient as through the
    joint graph, without any of the losses' graphs in memory beside the model's, and with one dL/dh at a time.

    Attributes:
        streams: {l: h[l] [B, S, D]} of one forward pass.
        loss: (l, h[l]) -> its share, [] float32, differentiable in h[l] and in nothing else that is trained; and what
            to log of it.
    """

    streams: Mapping[int, Tensor]
    loss: Callable[[int, Tensor], tuple[Tensor, Numbers]]

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        """See `Cost`."""
        measured: dict[int, tuple[Tensor, Numbers]] = {}
        loss = self.loss  # a hook that knew the streams would be part of a cycle, and keep them until it is collected

        def measure(layer: int, stream: Tensor) -> Tensor | None:
            """The gradient of one stream's own loss."""
            with torch.set_grad_enabled(stream.requires_grad):  # a backward pass switches gradients off
                share, numbers = loss(layer, stream)
                measured[layer] = share.detach(), numbers
                return torch.autograd.grad(weight * share, stream)[0] if share.requires_grad else None

        def joined(layer: int, leaf: Tensor, above: Tensor) -> Tensor:
            """The gradient of a stream: what the blocks above contribute, and its own loss."""
            own = measure(layer, leaf)
            return above if own is None else above + own

        trained = [layer for layer in sorted(self.streams) if weight != 0.0 and self.streams[layer].requires_grad]
        for layer in trained[:-1]:
            leaf = self.streams[layer].detach().requires_grad_()
            self.streams[layer].register_hook(partial(joined, layer, leaf))
        if trained:
            top = self.streams[trained[-1]]
            top.backward(measure(trained[-1], top.detach().requires_grad_()))
        for layer in self.streams.keys() - measured.keys():  # h[0] has no gradient where embeddings are frozen
            measure(layer, self.streams[layer].detach())
        total, logged = torch.zeros((), device=next(iter(self.streams.values())).device), Numbers()
        for layer in sorted(measured):
            share, numbers = measured[layer]
            total = total + share
            add(logged, numbers)
        return total, logged


def add(numbers: Numbers, others: Mapping[str, Tensor]) -> None:
    """Add numbers to those of the same name."""
    for key, value in others.items():
        numbers[key] = numbers[key] + value if key in numbers else value


def rising(coefficient: float, start: float = 0.0) -> Callable[[float], float]:
    """A weight that rises linearly, from `start` times the coefficient to all of it."""
    return lambda s: coefficient * (start + (1.0 - start) * s)


def falling(coefficient: float, by: float = 0.25) -> Callable[[float], float]:
    """A weight that falls linearly, from the coefficient by a share of it."""
    return lambda s: coefficient * (1.0 - by * s)
