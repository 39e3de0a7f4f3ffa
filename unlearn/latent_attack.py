"""Latent adversarial training (Sheshadri et al. 2024, https://arxiv.org/abs/2407.15549), for every method: before each
forget loss an attack perturbs the residual stream so that the model predicts the forget text; the loss is taken there.

    d <- argmin over |d[t, l]| <= radius of NLL(forget text | h[l] + d[l]),   then  F at h[l] + d[l], with d fixed

by K steps of Adam from d = 0, each followed by a projection of every token's d onto the ball. As in the authors' code
but for Adam's weight decay. Real tokens alone are perturbed; the original, where a loss compares with it, is not.

Shapes: B windows of a micro-batch, S tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.batches import Rows
from unlearn.config import TrainConfig
from unlearn.errors import UserError
from unlearn.losses import next_token
from unlearn.methods.terms import Cost, Numbers, Original, Term, add
from unlearn.model import blocks, final_hidden, softcap, through_head

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class LatentAttack:
    """Finds perturbations, and holds those that the model's blocks are to add.

    Attributes:
        steps, rate, radius: see `LatentFlags`. layers: l at which the stream is perturbed.
        added: {l: d[l] [B, S, D] float32}, of the micro-batch at hand; empty outside of it.
    """

    model: PreTrainedModel
    layers: tuple[int, ...]
    steps: int
    rate: float
    radius: float
    added: dict[int, Tensor] = field(default_factory=dict)

    def on(self, term: Term) -> Term:
        """The term, with its loss taken under attack; its log has the attack's last loss, `latent_nll`, in nats.

        Raises:
            UserError: the loss does not read as deep as a layer that is perturbed.
        """
        deepest = term.needs.deepest
        if deepest is not None and max(self.layers) > deepest:
            raise UserError(
                f"expected --latent-layers up to {deepest}, the deepest that the forget loss reads; found "
                f"{max(self.layers)}: choose others"
            )

        def cost(rows: Rows) -> Cost:
            reached = self.search(rows)
            with self.perturbing():
                found = term.cost(rows)
            self.added.clear()
            return Attacked(found, {"latent_nll": reached})

        needs = replace(
            term.needs,
            deepest=None,  # the attack reads the unembedding, whatever the loss does
            kept=term.needs.kept + 8 * len(self.layers),  # in float32: perturbation, gradient and two moments
            more_forward=term.needs.more_forward + self.steps,
            more_backward=term.needs.more_backward + self.steps,
        )
        return replace(term, cost=cost, needs=needs)

    def suspended(self, original: Original) -> Original:
        """The original without perturbations, also where it is the model without its adapters."""

        @contextmanager
        def before() -> Iterator[PreTrainedModel]:
            kept, self.added = self.added, {}
            try:
                with original() as model:
                    yield model
            finally:
                self.added = kept

        return before

    def search(self, rows: Rows) -> Tensor:
        """Find the perturbations of a micro-batch, and leave them in `added`.

        Each token's loss counts as one here, whatever the batch: what an attack finds does not depend on it.

        Returns:
            this rank's share of the mean next-token loss before the last step of the attack, [] float32.
        """
        shape = (*rows.input_ids.shape, self.model.config.hidden_size)
        found = {layer: torch.zeros(shape, device=rows.input_ids.device) for layer in self.layers}
        moments = {layer: (torch.zeros_like(d), torch.zeros_like(d)) for layer, d in found.items()}
        share = torch.zeros((), device=rows.input_ids.device)
        for step in range(1, self.steps + 1):
            self.added = {layer: d.requires_grad_() for layer, d in found.items()}
            with torch.enable_grad(), self.perturbing():
                loss, losses = self._next_tokens(rows)
                gradients = torch.autograd.grad(loss, list(self.added.values()))
            share = (rows.leading_weights() * losses).sum()
            with torch.no_grad():
                found = {
                    layer: self._moved(found[layer], gradient, moments[layer], step)
                    for layer, gradient in zip(self.layers, gradients, strict=True)
                }
        self.added = found
        return share

    def _next_tokens(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The sum of the next-token losses [] under the perturbations, and each [M]."""
        hidden = final_hidden(self.model, rows.input_ids, rows.at_leading)  # [M, D]
        targets, ones = rows.next_ids(), torch.ones_like(rows.leading_weights())

        def read(live: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
            return next_token(live, matrix.detach(), targets, ones, softcap=softcap(self.model))

        return through_head(self.model, hidden, read)

    def _moved(self, d: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
        """One step of Adam, and the projection; padding has no gradient and stays at 0."""
        first, second = moments
        first.lerp_(gradient, 1.0 - BETAS[0])
        second.lerp_(gradient.square(), 1.0 - BETAS[1])
        scale = (second / (1.0 - BETAS[1] ** step)).sqrt() + EPS
        d = d - self.rate * first / (1.0 - BETAS[0] ** step) / scale
        norms = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
        return d * (self.radius / norms.clamp(min=self.radius))

    @contextmanager
    def perturbing(self) -> Iterator[None]:
        """Forward passes in the block add what is in `added`, where a loss's own hooks then read it."""
        stack = blocks(self.model)
        handles = [
            stack[layer - 1].register_forward_hook(self._leaving(layer))
            if layer > 0
            else stack[0].register_forward_pre_hook(self._entering, with_kwargs=True)
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._perturbed(0, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._perturbed(0, kwargs["hidden_states"])}

    def _leaving(self, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._perturbed(layer, output[0]), *output[1:])
            return self._perturbed(layer, output)

        return hook

    def _perturbed(self, layer: int, stream: Tensor) -> Tensor:
        return stream + self.added[layer].to(stream.dtype) if self.added else stream


@dataclass(frozen=True)
class Attacked:
    """A cost under attack, and what to log of the attack."""

    cost: Cost
    numbers: Mapping[str, Tensor]

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        """See `Cost`."""
        share, numbers = self.cost.backward(weight)
        logged = Numbers(numbers)
        add(logged, self.numbers)
        return share, logged


def latent_attack(config: TrainConfig, model: PreTrainedModel) -> LatentAttack | None:
    """What --latent-attack asks for, None without it."""
    if not config.latent_attack:
        return None
    assert config.latent_lr is not None and config.latent_radius is not None
    layers = config.latent_layers or tuple(getattr(config, "layers", ())) or (0,)
    below = tuple(layer for layer in sorted(set(layers)) if layer < model.config.num_hidden_layers) or (0,)
    return LatentAttack(model, below, config.latent_attack, config.latent_lr, config.latent_radius)
