"""Weight distortion (Siddiqui et al. 2025, https://arxiv.org/abs/2505.22310): add noise to every trained weight, then
train on retain text alone.

    start:  theta = theta_model + noise N, N standard normal;   loss = the retain loss

Published: noise 0.02 and the next tokens of retain text, in vision.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from unlearn.config import RETAINS, SCHEDULED, RetainFlags
from unlearn.errors import UserError
from unlearn.flags import flag
from unlearn.methods.retain import hold
from unlearn.methods.terms import Parts, Phase
from unlearn.seeding import generator
from unlearn.weights import local_rows

TUNING = ("noise=0.01,0.02,0.05",)


@dataclass(frozen=True, kw_only=True)
class Flags(RetainFlags):
    """Distort every trained weight with noise, then train on retain text alone."""

    noise: float = flag(0.02, above=0.0)
    """Standard deviation of the noise. Published: 0.02 in vision; a 6.9 B model bears about 0.01."""
    retain_coef: float | None = flag(1.0, above=0.0)
    """Weight of the retain loss."""
    retain_start: float = flag(1.0, least=0.0, most=1.0, only=(RETAINS, SCHEDULED))
    """Share of --retain-coef at the first step, from which it rises linearly. Published: 1."""
    retain_loss: Literal["kl", "next-token"] | None = flag(published="next-token", only=RETAINS)
    """next-token: cross-entropy of retain text (published); kl: KL(original || model) a token."""

    @property
    def unread(self) -> dict[str, str]:
        """Forget text: nothing is asked of it."""
        return {"forget": "with --method distort, which trains on retain text alone"}

    def check_method(self) -> None:
        """Raise unless there are weights to distort."""
        if self.lora_rank:  # type: ignore[attr-defined]  # of the whole configuration
            raise UserError("--lora-rank has no effect with --method distort, which trains what it adds noise to")


def phases(flags: Flags, parts: Parts) -> list[Phase]:
    """One phase, which begins with noise."""
    return [Phase("", hold(flags, parts, ()), begin=lambda model: distort(model, flags.noise, parts.seed))]


@torch.no_grad()
def distort(model: PreTrainedModel, size: float, seed: int) -> None:
    """Add normal noise to every trained parameter, alike however it is sharded."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows, first = local_rows(parameter)
            noise = torch.randn(parameter.shape, generator=generator(seed, "distort", name))
            rows.add_(noise[first : first + rows.shape[0]].to(rows), alpha=size)
