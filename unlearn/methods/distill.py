"""UNDO (Lee et al. 2025, https://arxiv.org/abs/2506.06278): distil a model that has unlearned into a noised copy of
itself, so that what it only suppressed is left behind.

    start:  theta = (1 - a) theta_model + a b N
    loss = retain_coef KL(teacher || model) on retain text + KL(teacher || model) on forget text, nats a token

N is Xavier-uniform for matrices and 0 for vectors, as in the authors' code (do_corruption), and of what trains alone.
Published: b = 0.1; a from 0.1 to 0.7, learning rate 9e-4, both domains alike (languages); a = 0.25, b = 0, 2e-5 (WMDP).
"""

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.flags import flag
from unlearn.methods.retain import by_prediction
from unlearn.methods.terms import Needs, Parts, Phase, Term
from unlearn.seeding import generator
from unlearn.weights import local_rows

TUNING = ("noise=0.25,0.4,0.6,0.8", "noise-scale=0.1,0.3")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Distil a model that has unlearned, --model, into a noised copy of itself."""

    teacher: str | None = None
    """Model to learn from, a local folder or hub name. Default: --model, as it was before the noise."""
    noise: float = flag(0.25, least=0.0, most=1.0)
    """Share a of every trained weight that is replaced by noise. Published: 0.25 for WMDP, 0.1 to 0.7 elsewhere."""
    noise_scale: float = flag(0.1, least=0.0)
    """Size b of that noise, as a multiple of Xavier's. Published: 0.1; 0, shrinking alone, for WMDP."""
    on_forget: bool = True
    """Learn the teacher's predictions on forget text too. Published: yes."""
    retain_coef: float = flag(1.0, above=0.0)
    """Weight of retain text beside forget text. Published: 1."""
    adam_lr: float | None = flag(2e-5, above=0.0)
    """Peak learning rate of AdamW. Published: 2e-5 for WMDP, 9e-4 elsewhere."""

    @property
    def unread(self) -> dict[str, str]:
        """Forget text, if nothing is learned on it."""
        return {} if self.on_forget else {"forget": "with --no-on-forget"}

    def check_method(self) -> None:
        """Raise unless there are weights that noise can be mixed into."""
        if self.lora_rank:  # type: ignore[attr-defined]  # of the whole configuration
            raise UserError("--lora-rank has no effect with --method distill, which trains what it adds noise to")


def phases(flags: Flags, parts: Parts) -> list[Phase]:
    """One phase, which begins with noise."""
    taught, needs = parts, Needs(original=True)
    if flags.teacher is not None:
        teacher = parts.teacher(flags.teacher)
        taught = dataclasses.replace(parts, original=lambda: nullcontext(teacher))
        needs = Needs(teacher=sum(parameter.numel() for parameter in teacher.parameters()))
    cost = by_prediction(taught)
    terms = [Term("retain", parts.batches["retain"], cost, lambda s: flags.retain_coef, needs)]
    if flags.on_forget:
        terms.append(Term("forget", parts.batches["forget"], cost, needs=needs))
    return [Phase("", terms, begin=lambda model: mix_noise(model, flags.noise, flags.noise_scale, parts.seed))]


@torch.no_grad()
def mix_noise(model: PreTrainedModel, share: float, scale: float, seed: int) -> None:
    """theta <- (1 - share) theta + share scale N for every trained parameter, alike however it is sharded."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows, first = local_rows(parameter)
            rows.mul_(1.0 - share)
            if parameter.ndim >= 2:
                noise = xavier(tuple(parameter.shape), seed, name)[first : first + rows.shape[0]]
                rows.add_(noise.to(rows), alpha=share * scale)


def xavier(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """Uniform in +-sqrt(6 / (m + n)) for matrices [.., m, n] (Glorot and Bengio 2010, equation 16), float32."""
    bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    return bound * (2.0 * torch.rand(shape, generator=generator(seed, "distill", name)) - 1.0)
