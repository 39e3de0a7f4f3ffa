"""Tuned-lens unlearning: what a frozen lens reads off the target layers is pushed towards uniform.

    F = mean over target layers and tokens of (logsumexp z[l] - mean z[l]) / ln V,  loss = remove(s) F + retain(s) R
    remove(s) = remove_coef (1 - 0.25 s),  retain(s) = retain_coef (start + (1 - start) s)

R is KL(original || model) in nats, or the L2 distance of the residual streams at the target layers.

Shapes: B rows, S positions, N real tokens among them, D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unlearn.batches import Rows
from unlearn.config import FORGETS, RETAINS, LayerFlags, RetainFlags, check_layers
from unlearn.errors import UserError
from unlearn.flags import by_mode, flag
from unlearn.losses import next_token, uniform_per_token
from unlearn.methods.retain import hold
from unlearn.methods.terms import Cost, Needs, Numbers, OnStreams, Parts, Phase, Term, falling
from unlearn.model import residual_streams
from unlearn.seeding import random_bits

TUNING = ("remove-coef=2,10,50", "retain-coef=1,5,20")


@dataclass(frozen=True, kw_only=True)
class Flags(LayerFlags, RetainFlags):
    """Unlearn a model: push what a frozen tuned lens reads off the target layers towards uniform on forget text, and
    hold the model to its original on retain text."""

    layers: tuple[int, ...] = (5, 10, 15, 20, 25, 30)
    """Target layers l, in 0..L: the residual stream that enters block l; L is the final one, read without a lens.
    Published: 5 10 15 20 25 30."""
    layers_order: Literal["together", "back-to-front"] = flag("together", only=FORGETS)
    """together: one loss, the mean over the layers. back-to-front: one layer after another, the deepest first, each
    with all of the run's steps and with fresh optimizers (sequential, https://github.com/EleutherAI/unlearn)."""
    lens: str | None = flag(published=lambda config: config.default_lens, only=FORGETS)
    """Tuned lens of the model: a local folder or a hub name. Default: <model>-lens, as in the published runs."""
    lens_tap: Literal["input", "output"] = "input"
    """Apply translator l to the stream that enters block l (input), or to the one that leaves it (output: the
    off-by-one of earlier published runs, only for comparing with them)."""
    forget_loss: Literal["uniform", "sampled", "gradient-ascent"] = flag("uniform", only=FORGETS)
    """uniform: exact cross-entropy against the uniform distribution; sampled: against one random token a position
    (about 200 times noisier); gradient-ascent: minus the true next token's. All over ln V."""
    remove_coef: float | None = flag(published=by_mode(lora=5.0, full=2.0), least=0.0)
    """Weight of the forget loss; falls to 75 % of it over the run. Published: 5 with LoRA, 2 full."""
    retain_coef: float | None = flag(published=by_mode(lora=5.0, full=1.0), least=0.0)
    """Weight of the retain loss at the end of the run. Published: 5 with LoRA, 1 full."""
    retain_loss: Literal["kl", "l2", "mse", "next-token"] | None = flag(
        published=by_mode(lora="l2", full="kl"), only=RETAINS
    )
    """kl: KL(original || model) a token, in nats; l2: distance of the residual streams at the target layers; mse: mean
    square of their difference; next-token: cross-entropy of retain text. Published: l2 with LoRA, kl full."""
    prompts: tuple[str, ...] = flag((), only=FORGETS)
    """Texts to read with the lens at every layer, before the first step and after the last, for the report; written to
    lens.json."""

    @property
    def uses_layers(self) -> bool:
        """Whether a loss is read at target layers: the divergence from the original is not."""
        return self.remove_coef != 0.0 or self.retain_loss in ("l2", "mse")

    def check_method(self) -> None:
        """Raise unless there is something to train on, layers where one is read at them, and no empty prompt."""
        LayerFlags.check_method(self)
        if self.remove_coef == 0.0 and self.retain_coef == 0.0:
            raise UserError("expected --remove-coef or --retain-coef above 0; found both 0: nothing to train on")
        if not self.uses_layers and self.layers != Flags.layers:
            raise UserError("--layers has no effect with --remove-coef 0 and this --retain-loss: leave it out")
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError(f"expected --prompts to be texts, none of them empty; found {self.prompts}")

    def check_depth(self, depth: int) -> None:
        """Raise unless every target layer exists in a model of `depth` blocks, or none is looked at."""
        if self.uses_layers:
            check_layers(self.layers, depth - 1 if self.lens_tap == "output" else depth, depth)
        if set(self.layers) == {depth} and self.lens not in (None, self.default_lens):
            raise UserError(f"--lens has no effect with --layers {depth}, the final stream: leave it out")

    @property
    def default_lens(self) -> str:
        """The name that the published lenses have beside their models."""
        return f"{self.model.rstrip('/')}-lens"  # type: ignore[attr-defined]  # of the whole configuration


def phases(flags: Flags, parts: Parts) -> list[Phase]:
    """One phase of all layers, or one of each layer; they share the lens."""
    if flags.layers_order == "together":
        return [Phase("", terms(flags, parts))]
    lens = parts.lens(flags.layers)
    shared, order = replace(parts, lens=lambda layers: lens), sorted(flags.layers, reverse=True)
    return [Phase(f"layer {layer}", terms(replace(flags, layers=(layer,)), shared)) for layer in order]


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term and the retain term, without one whose coefficient is 0."""
    shift = 1 if flags.lens_tap == "output" else 0  # how far above h[l] translator l reads
    tapped = tuple(layer + shift for layer in flags.layers)
    found = []
    if flags.remove_coef:
        read_off = ReadOff(flags, parts, shift)
        lens = read_off.lens
        share = min(1.0, len(tapped) / max(1, len(lens.layers)))  # of a lens that several phases read
        size = share * sum(parameter.nbytes for parameter in lens.parameters())
        flops = len(tapped) * (4 * lens.unembedding.numel() + 4 * lens.unembedding.shape[1] ** 2)
        needs = Needs(deepest=max(tapped), bytes=size, flops=flops)
        found.append(Term("forget", parts.batches["forget"], read_off, falling(flags.remove_coef), needs))
    return found + hold(flags, parts, tapped)


class ReadOff:
    """The forget loss of what the lens reads at each target layer l, h[l + shift] [B, S, D]."""

    def __init__(self, flags: Flags, parts: Parts, shift: int):
        self.flags, self.model, self.shift, self.lens = flags, parts.model, shift, parts.lens(flags.layers)

    def __call__(self, rows: Rows) -> Cost:
        def loss(tap: int, stream: Tensor) -> tuple[Tensor, Numbers]:
            return self.layer_loss(rows, stream, tap - self.shift)

        tapped = [layer + self.shift for layer in self.flags.layers]
        return OnStreams(residual_streams(self.model, rows.input_ids, tapped), loss)

    def layer_loss(self, rows: Rows, stream: Tensor, layer: int) -> tuple[Tensor, Numbers]:
        """One target layer's share of F, [] float32, and of its uniform loss and entropy."""
        exact = self.flags.forget_loss == "uniform"
        with torch.set_grad_enabled(exact and torch.is_grad_enabled()):
            hidden = self.lens.hidden(rows.at_real(stream), layer)  # [N, D]
            losses, entropy = uniform_per_token(hidden, self.lens.unembedding, softcap=self.lens.softcap)  # [N]
        mean = rows.mean(losses)
        loss = mean if exact else self.against_tokens(rows, stream, layer)
        numbers = {f"uniform_loss/{layer}": mean.detach(), f"entropy/{layer}": rows.mean(entropy)}
        return loss / len(self.flags.layers), numbers

    def against_tokens(self, rows: Rows, stream: Tensor, layer: int) -> Tensor:
        """Cross-entropy against tokens drawn uniformly, or minus that of the true ones, over ln V; [] float32."""
        vocabulary = self.lens.unembedding.shape[0]
        if self.flags.forget_loss == "sampled":
            draws = random_bits(rows.keys ^ layer, rows.input_ids.shape[1])[:, :, 0] % vocabulary  # [B, S]
            hidden, targets, weights = rows.at_real(stream), rows.at_real(draws).long(), rows.weights()
        else:
            hidden, targets, weights = rows.at_leading(stream), rows.next_ids(), -rows.leading_weights()
        read = self.lens.hidden(hidden, layer)
        total, _ = next_token(read, self.lens.unembedding, targets, weights, softcap=self.lens.softcap)
        return total / math.log(vocabulary)
