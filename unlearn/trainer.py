"""The training loop: gradients, their sum over ranks, a finite check, the optimizers, the log."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn.distributed import all_sum, all_true, sum_gradients
from unlearn.errors import UserError
from unlearn.metrics import MetricsLog
from unlearn.optim.build import Schedule, set_learning_rates

Evaluate = Callable[[int], None]  # called with the number of optimizer steps done


class Objective(Protocol):
    """What a batch costs."""

    def backward(self, step: int) -> Mapping[str, Tensor | float]:
        """Add this rank's share of the gradient of one optimizer step's loss to `.grad`.

        Returns:
            this rank's share of each number to log, under the same keys on every rank: the sums over ranks are logged.
        """
        ...

    def settings(self, step: int) -> Mapping[str, float]:
        """Numbers to log that are the same on every rank, e.g. coefficients."""
        ...


def train(
    model: nn.Module,
    objective: Objective,
    optimizers: Mapping[str, Optimizer],
    *,
    steps: int,
    schedule: Schedule,
    log: MetricsLog,
    clip: float = math.inf,
    log_every: int = 1,
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
) -> None:
    """Run `steps` optimizer steps on replicated parameters.

    Args:
        objective: adds gradients; see `Objective`.
        optimizers: by the name under which their learning rates are logged, `<name>_lr`.
        schedule: step -> factor of the peak learning rates.
        clip: largest 2-norm of the whole gradient.
        evaluate: called with the number of steps done, every `eval_every` of them, the first time before any; what
            the last step leaves is the caller's to measure.

    Raises:
        UserError: a loss or gradient is not finite on some rank; no weight of that step has then been changed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(steps):
        if evaluate is not None and eval_every is not None and step % eval_every == 0:
            evaluate(step)
        started = time.monotonic()
        model.train()
        metrics = objective.backward(step)
        sum_gradients(parameters)
        norm = check_gradients(parameters, metrics, step)
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        factor = schedule(step)
        set_learning_rates(list(optimizers.values()), factor)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % log_every == 0 or step == steps - 1:
            line = {"step": step} | summed(metrics, norm.device) | dict(objective.settings(step))
            line["gradient_norm"] = norm.item()
            line |= {f"{name}_lr": built.param_groups[0]["lr"] for name, built in optimizers.items()}
            line["tokens_per_second"] = line.pop("tokens", 0.0) / (time.monotonic() - started)
            log.write(line, shown=("forget_loss", "retain_loss", "loss"))
        log.advance()
    model.eval()


def check_gradients(parameters: list[nn.Parameter], metrics: Mapping[str, Tensor | float], step: int) -> Tensor:
    """The 2-norm of the whole gradient, float32 []; raises on every rank if a number is not finite on one."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).float()
    numbers = torch.cat([norm[None].double(), _stack(metrics, norm.device)])
    if not all_true(bool(torch.isfinite(numbers).all()), norm.device):
        raise UserError(
            f"expected finite losses and gradients; found NaN or infinity at step {step}, before any weight was "
            "changed: lower the learning rates or coefficients, or use --dtype fp32"
        )
    return norm


def summed(metrics: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """The sum over ranks of every metric, in one collective."""
    return dict(zip(metrics, all_sum(_stack(metrics, device)).tolist(), strict=True))


def _stack(metrics: Mapping[str, Tensor | float], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in metrics.values()])
