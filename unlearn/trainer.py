"""The training loop: gradients, their sum over ranks, a finite check, the optimizers, the log."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unlearn.cost import held_gib
from unlearn.device import dense_tflops
from unlearn.distributed import STEP_TIMEOUT, all_sum, all_true, set_timeout, sum_gradients, world_size
from unlearn.errors import NotFinite
from unlearn.lora import set_dropout_rows
from unlearn.methods.terms import Hooks, Loss, Numbers, add
from unlearn.optim.build import Schedule, set_learning_rates
from unlearn.run.checkpoint import Checkpoints
from unlearn.run.log import MetricsLog
from unlearn.sharding import all_reducing_last, gradient_norm, reshard
from unlearn.weights import local_rows

SHOWN = ("forget_loss", "retain_loss", "loss", "tokens_per_second", "mfu", "peak_gib")  # beside the bar
Evaluate = Callable[[int], None]  # called with the number of optimizer steps done
GradientFilter = Callable[[str, Mapping[str, nn.Parameter]], None]  # see `Hooks.filter`


def train(
    model: nn.Module,
    loss: Loss,
    optimizers: Mapping[str, Optimizer],
    *,
    steps: int,
    schedule: Schedule,
    log: MetricsLog,
    clip: float = math.inf,
    log_every: int = 1,
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
    first: int = 0,
    offset: int = 0,
    phase: str = "",
    hooks: Hooks | None = None,
    checkpoints: Checkpoints | None = None,
    timeout: timedelta = STEP_TIMEOUT,
) -> None:
    """Run `steps` optimizer steps on parameters that are replicated, or all sharded over one mesh.

    Args:
        schedule: step -> factor of the peak learning rates.
        optimizers: by the name under which their learning rates are logged, `<name>_lr`.
        clip: largest 2-norm of the whole gradient.
        evaluate: called with the number of steps done, every `eval_every` of them, the first time before any; what
            the last step leaves is the caller's to measure.
        first: steps that were done before, in a run that goes on.
        offset: steps of the phases before this one: what is saved, logged and measured counts from the run's start.
        phase: its name for the log, if it has one. hooks: within a step; where they end the phase, it counts as done
            to its last step, and the log says why.
        checkpoints: told after every step; while there are any, a signal to stop waits for the step's end.
        timeout: how long ranks wait for each other after the first step.

    Raises:
        SystemExit: the run was told to stop, and is saved.
        NotFinite: a loss or gradient is not finite on some rank; no weight of that step has then been changed.
    """
    hooks = hooks or Hooks()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len({isinstance(parameter, DTensor) for parameter in parameters}) == 1, "some weights are still gathered"
    with checkpoints.during_steps() if checkpoints is not None else nullcontext():
        for step in range(first, steps):
            if evaluate is not None and eval_every is not None and (offset + step) % eval_every == 0:
                _evaluate(evaluate, offset + step, checkpoints)
            started = time.monotonic()
            model.train()
            metrics = gradients(model, loss, step, steps, _checked(hooks.filter, offset + step))
            norm = check_gradients(parameters, metrics, offset + step)
            clip_gradients(parameters, clip, norm)
            set_learning_rates(list(optimizers.values()), schedule(step))
            _update(optimizers.values(), norm.device)
            logged = step % log_every == 0 or step == steps - 1
            numbers = summed(metrics, norm.device) if logged or hooks.stop is not None else {}
            settings = _settings(loss, optimizers, step, steps)  # before hooks change a weight
            why = _after_step(hooks, step + 1, numbers)
            if logged or why:
                numbers |= {"gradient_norm": norm.item()} | settings | dict(loss.cost(step))
                numbers |= _rates(numbers, time.monotonic() - started, norm.device)
                words = {name: word for name, word in (("phase", phase), ("stopped", why)) if word}
                log.write({"step": offset + step, **words, **numbers}, shown=SHOWN)
            done = steps if why else step + 1
            log.advance(done - step)
            if step == first:
                set_timeout(timeout)
            if checkpoints is not None:
                checkpoints.after(offset + done)
            if why:
                break
    model.eval()


def _evaluate(evaluate: Evaluate, step: int, checkpoints: Checkpoints | None) -> None:
    """Measure; what is being written is whole before, since a measurement may take long, and be killed."""
    if checkpoints is not None:
        checkpoints.settle()
    evaluate(step)


def _checked(filter: GradientFilter | None, step: int) -> GradientFilter | None:
    """A filter that looks at a gradient only once it is known to be finite, since it may keep something of it."""
    if filter is None:
        return None

    def checked(name: str, trained: Mapping[str, nn.Parameter]) -> None:
        check_gradients(list(trained.values()), {}, step)
        filter(name, trained)

    return checked


def _after_step(hooks: Hooks, done: int, numbers: dict[str, float]) -> str | None:
    """What hooks do once the optimizers have stepped; why the phase ends here, if it does."""
    if hooks.after_step is not None:
        hooks.after_step(done)
    return None if hooks.stop is None else hooks.stop(done, numbers)


def _settings(loss: Loss, optimizers: Mapping[str, Optimizer], step: int, steps: int) -> dict[str, float]:
    """The weight of each term, and the learning rates, of a step."""
    pairs = zip(loss.terms, loss.weights(step, steps), strict=True)
    rates = {f"{name}_lr": built.param_groups[0]["lr"] for name, built in optimizers.items()}
    return {f"{term.name}_weight": weight for term, weight in pairs} | rates


def _rates(numbers: dict[str, float], seconds: float, device: torch.device) -> dict[str, float]:
    """Tokens a second over all ranks, in place of their number; 10^12 operations a second of each rank, without those
    that are done again, and their share of the chip's rate, where that is known; the most memory of this rank."""
    rates = {"tokens_per_second": numbers.pop("tokens", 0.0) / seconds, "peak_gib": round(held_gib(device), 3)}
    if "flops" in numbers:
        rates["tflops_per_rank"] = numbers["flops"] / seconds / world_size() / 1e12
        chip = dense_tflops(device)
        rates |= {} if chip is None else {"mfu": rates["tflops_per_rank"] / chip}
    return rates


def _update(optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """Step every optimizer, on a GPU to its end.

    FSDP2's streams wait for an optimizer only in the first forward pass after a backward pass; the step may have ended
    in one without gradients, which was left early.
    """
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(
    model: nn.Module, loss: Loss, step: int, steps: int, filter: GradientFilter | None = None
) -> dict[str, Tensor]:
    """Leave the gradient of one optimizer step's loss in `.grad`.

    Each term is summed over micro-batches and ranks before the terms are added to each other. With two micro-batches a
    term the sums are then of the same numbers in the same order, and the result equal to the bit, whether one rank
    has both or two ranks one each. FSDP2 has summed a sharded gradient, and divided it by the ranks, during backward.

    Args:
        model: whose parameters are trained, all of them replicated or all of them sharded.
        filter: of one term's gradient; see `Hooks`.

    Returns:
        this rank's share of the numbers to log, [] each: the loss of each term, their weighted sum, tokens, and what
        the terms give.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters, weights = list(trained.values()), loss.weights(step, steps)
    apart = filter is not None or not isinstance(parameters[0], DTensor)
    last = max((index for index, weight in enumerate(weights) if weight != 0.0), default=-1)
    metrics: Numbers = {}
    earlier: list[Tensor] = []
    for index, (term, weight) in enumerate(zip(loss.terms, weights, strict=True)):
        micro_batches = term.batches.micro_batches(step, parameters[0].device)
        for rows in all_reducing_last(model, micro_batches, ends_step=index == last or filter is not None):
            set_dropout_rows(model, rows.keys)
            with torch.set_grad_enabled(weight != 0.0), loss.precision():
                cost = term.cost(rows)
            share, numbers = cost.backward(weight)
            del cost  # and with it the forward pass, before the next one
            for gathered in (model, *loss.frozen):  # a forward pass ended early, or FSDP2 fetched what nobody used
                reshard(gathered)
            tokens = torch.full((), rows.tokens, device=share.device)
            add(metrics, {"tokens": tokens, f"{term.name}_loss": share, "loss": weight * share} | numbers)
        if apart:
            _sum_over_ranks(parameters)
            if filter is not None and weight != 0.0:
                filter(term.name, trained)
            earlier = _add_term(parameters, earlier)
    if apart:
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
    else:
        _sum_over_ranks(parameters)
    return metrics


def _sum_over_ranks(parameters: Sequence[nn.Parameter]) -> None:
    """Make `.grad` the sum over ranks. Of a sharded one FSDP2 has taken the mean, if it had a part in the loss."""
    if not isinstance(parameters[0], DTensor):
        return sum_gradients(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    torch._foreach_mul_(_local_gradients(parameters), parameters[0].device_mesh.size())


def _add_term(parameters: Sequence[nn.Parameter], earlier: list[Tensor]) -> list[Tensor]:
    """Take one term's gradients out of `.grad`, and add those of the terms before it."""
    if earlier:
        torch._foreach_add_(_local_gradients(parameters), [local_rows(gradient)[0] for gradient in earlier])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _local_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of each gradient."""
    return [local_rows(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]


def check_gradients(parameters: Sequence[nn.Parameter], metrics: Mapping[str, Tensor], step: int) -> Tensor:
    """The 2-norm of the whole gradient, float32 []; raises on every rank if a number is not finite on one."""
    norm = gradient_norm(parameters).float()
    numbers = _stack({"norm": norm, **metrics}, norm.device)
    if not all_true(bool(torch.isfinite(numbers).all()), norm.device):
        raise NotFinite(
            f"expected finite losses and gradients; found NaN or infinity at step {step}, before any weight was "
            "changed: lower the learning rates or coefficients, or use --dtype fp32"
        )
    return norm


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale the gradients so that the 2-norm of the whole, now `norm`, is at most `largest`."""
    torch._foreach_mul_(_local_gradients(parameters), (largest / (norm + 1e-6)).clamp(max=1.0))


def summed(metrics: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """The sum over ranks of every metric, in one collective."""
    return dict(zip(metrics, all_sum(_stack(metrics, device)).tolist(), strict=True))


def _stack(metrics: Mapping[str, Tensor], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in metrics.values()])
