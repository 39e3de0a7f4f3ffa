"""Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, then orthogonalisation."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unlearn.optim.newton_schulz import orthogonalize

AdjustLr = Literal["match_rms_adamw", "original"]


class Muon(torch.optim.Optimizer):
    """Muon for matrices that are whole on every rank.

    Communication: none. Every rank holds the same summed gradients and repeats the same arithmetic, so that the
    weights stay the same to the bit.

    Args:
        parameters: matrices [m, n].
        lr: learning rate, before the adjustment by shape.
        momentum: of the exponential moving average of gradients.
        nesterov: look one step of momentum ahead.
        weight_decay: decoupled; each step multiplies a weight by 1 - lr * weight_decay, with the unadjusted lr.
        adjust_lr: `match_rms_adamw` multiplies lr by 0.2 sqrt(max(m, n)), so that an update's root mean square is that
            of AdamW (Liu et al. 2025, https://arxiv.org/abs/2502.16982); `original` by sqrt(max(1, m / n)).
        steps: Newton-Schulz iterations.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        adjust_lr: AdjustLr = "match_rms_adamw",
        steps: int = 5,
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(parameters, defaults | {"adjust_lr": adjust_lr, "steps": steps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"expected matrices for Muon; found a parameter of shape {tuple(parameter.shape)}")
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; a closure, if given, is evaluated first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[parameter]["momentum"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        update = orthogonalize(direction, group["steps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * lr_scale(parameter.shape, group["adjust_lr"]))


def lr_scale(shape: torch.Size, adjust_lr: AdjustLr) -> float:
    """What the learning rate of an [m, n] matrix is multiplied by."""
    rows, columns = shape
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
