"""A relearning adversary for every method: the forget gradient is taken at the point that a fine-tuning attack reaches.

    after each optimizer step:  phi <- phi - lr grad_phi NLL(forget text | theta, phi),   phi = {A, B} of every linear
    in it:                      g_forget = grad_theta F(theta, phi),   g_retain = grad_theta R(theta)

with W x + B A x in place of W x. NLL is the mean over the next tokens of the same global batch, and its gradient is
taken where g_forget is. MUDMAN (https://arxiv.org/abs/2506.12484) has a whole copy of the trained modules, forked anew
every 32 steps, and learning rate 1e-3; the adapters, their rank and their rate are RepSelect's
(https://arxiv.org/abs/2606.17168), which never begins anew.

The adapters are replicated, float32, and no parameters of the model: its optimizer, its checkpoints of weights and its
export do not know them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.batches import Rows
from unlearn.config import TrainConfig
from unlearn.distributed import sum_gradients
from unlearn.lora import linears, shape_of
from unlearn.losses import next_token
from unlearn.methods.terms import Cost, Hooks, Numbers, Original, Term, add
from unlearn.model import final_hidden, softcap, through_head
from unlearn.seeding import generator


@dataclass
class Adversary:
    """Adapters that relearn, and the hooks by which the model has them for a while.

    Attributes:
        rank, rate, restart: see `AdversaryFlags`. seed: of A's initial values.
        present: whether forward passes within `beside` have the adapters; the original's have not.
        learning: whether they are differentiated by the adapters, or have them for constants.
    """

    model: PreTrainedModel
    device: torch.device
    rank: int
    rate: float
    restart: int
    seed: int
    present: bool = True
    learning: bool = False

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The linear layers inside the blocks, by their names without any wrapper's."""
        found = linears(self.model)
        return {name.replace("._checkpoint_wrapped_module", "").removesuffix(".base"): m for name, m in found.items()}

    @cached_property
    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """A [r, in] and B [out, r] of each layer, float32."""
        found = {}
        for name, layer in self.layers.items():
            outputs, inputs = shape_of(layer)
            down, up = torch.empty(self.rank, inputs, device=self.device), torch.empty(outputs, self.rank)
            found[name] = nn.Parameter(down), nn.Parameter(up.to(self.device))
        self._begin(found)
        return found

    @torch.no_grad()
    def _begin(self, adapters: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
        """A Kaiming-uniform as LoRA's, B zero: the model as it is."""
        for name, (down, up) in adapters.items():
            noise = torch.rand(down.shape, generator=generator(self.seed, "adversary", name))
            down.copy_((2.0 * noise - 1.0) / math.sqrt(down.shape[1]))
            up.zero_()

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.adapters.values() for parameter in pair]

    def on(self, term: Term) -> Term:
        """The term, with its loss taken beside the adversary, who learns from its batches; the log has what the
        adversary scores, `adversary_nll`, in nats."""

        def cost(rows: Rows) -> Cost:
            scored = self.learn(rows)
            with self.beside():
                return Beside(term.cost(rows), self, scored)

        numbers = sum(self.rank * sum(shape_of(layer)) for layer in self.layers.values())
        needs = replace(
            term.needs,
            deepest=None,  # the adversary reads the unembedding, whatever the loss does
            bytes=term.needs.bytes + 8.0 * numbers,  # adapters and their gradients, float32
            more_forward=term.needs.more_forward + 1.0,
            more_backward=term.needs.more_backward + 1.0,
        )
        hooks = term.hooks.then(Hooks(after_step=self.step, state=self.state))
        return replace(term, cost=cost, needs=needs, hooks=hooks)

    def suspended(self, original: Original) -> Original:
        """The original without the adversary, also where it is the model without its adapters."""

        @contextmanager
        def before() -> Iterator[PreTrainedModel]:
            kept, self.present = self.present, False
            try:
                with original() as model:
                    yield model
            finally:
                self.present = kept

        return before

    def learn(self, rows: Rows) -> Tensor:
        """Add a micro-batch's share of the gradient of NLL to the adapters'; that share of NLL, [] float32."""
        weights, targets = rows.leading_weights(), rows.next_ids()

        def read(live: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
            return next_token(live, matrix.detach(), targets, weights, softcap=softcap(self.model))

        with torch.enable_grad(), self.beside(learning=True):
            hidden = final_hidden(self.model, rows.input_ids, rows.at_leading)  # [M, D]
            loss, _ = through_head(self.model, hidden, read)
            gradients = torch.autograd.grad(loss, self._parameters)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss.detach()

    @torch.no_grad()
    def step(self, done: int) -> None:
        """One step of SGD by what was learnt, alike on all ranks; a new beginning where one is due."""
        sum_gradients(self._parameters)
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.sub_(self.rate * parameter.grad)
            parameter.grad = None
        if self.restart and done % self.restart == 0:
            self._begin(self.adapters)

    def state(self) -> dict[str, Tensor]:
        """See `Hooks.state`."""
        pairs = self.adapters.items()
        return {f"adversary.{name}.{kind}": p.data for name, pair in pairs for kind, p in zip("AB", pair, strict=True)}

    @contextmanager
    def beside(self, *, learning: bool = False) -> Iterator[None]:
        """Forward passes in the block have the adapters, and so do the blocks of the model that it recomputes."""
        self.learning = learning
        handles = [
            layer.register_forward_hook(self._adding(*self.adapters[name])) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adding(self, down: nn.Parameter, up: nn.Parameter) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.present:
                return None
            x, pair = args[0], (down, up) if self.learning else (down.detach(), up.detach())
            update = F.linear(F.linear(x, pair[0].to(x.dtype)), pair[1].to(x.dtype))
            return output + update.to(output.dtype)

        return hook


@dataclass(frozen=True)
class Beside:
    """A cost beside the adversary, whose backward pass may recompute blocks; and what to log of the adversary."""

    cost: Cost
    adversary: Adversary
    scored: Tensor

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        """See `Cost`."""
        with self.adversary.beside():
            share, numbers = self.cost.backward(weight)
        logged = Numbers(numbers)
        add(logged, {"adversary_nll": self.scored})
        return share, logged


def adversary(config: TrainConfig, model: PreTrainedModel, device: torch.device) -> Adversary | None:
    """What --adversary asks for, None without it."""
    if config.adversary == "none":
        return None
    assert config.adversary_rank is not None and config.adversary_lr is not None
    return Adversary(model, device, config.adversary_rank, config.adversary_lr, config.adversary_restart, config.seed)
