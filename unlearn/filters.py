"""What may happen to the forget gradient before the optimizer sees it: --filter.

A filter is called with one term's gradient, summed over ranks, and changes it in place, alike however it is sharded.
Several follow each other in the order in which they are named. Other terms' gradients are left as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.config import TrainConfig
from unlearn.distributed import world_size
from unlearn.methods.terms import Hooks
from unlearn.model import blocks_prefix
from unlearn.optim.layout import Layout, layout_of
from unlearn.optim.rounds import pipeline, plan, run_round
from unlearn.sharding import gradient_norm
from unlearn.weights import local_rows

Gradients = Mapping[str, nn.Parameter]  # the trained parameters by name, with one term's gradient in `.grad`


def hooks_of(config: TrainConfig, model: PreTrainedModel) -> Hooks:
    """The filters that the flags ask for, none where they ask for none."""
    if not config.filter:
        return Hooks()
    makers: dict[str, Callable[[], Filter]] = {
        "normalise": lambda: Normalise(config.filter_norm or 0.0),
        "sign-mask": lambda: SignMask(model, config.filter_decay or 0.0),
        "collapse": lambda: Collapse(model, config.filter_decay or 0.0, config.filter_rank or 0, config.filter_hard),
    }
    chosen = [makers[name]() for name in config.filter]

    def apply(term: str, trained: Gradients) -> None:
        for one in chosen:
            one(term, trained)

    def state() -> dict[str, Tensor]:
        named = zip(config.filter, chosen, strict=True)
        return {f"{name}.{key}": value for name, one in named for key, value in one.state().items()}

    return Hooks(filter=apply, state=state)


class Filter:
    """Looks at a term's gradient, and changes the forget term's."""

    def __call__(self, term: str, trained: Gradients) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What it keeps from step to step, by name, for checkpoints."""
        return {}


@dataclass(frozen=True)
class Normalise(Filter):
    """Scale the forget gradient so that its 2-norm over all parameters is `norm`."""

    norm: float

    @torch.no_grad()
    def __call__(self, term: str, trained: Gradients) -> None:
        if term == "forget":
            gradients = [_rows(parameter.grad) for parameter in trained.values()]
            found = gradient_norm(list(trained.values()))
            torch._foreach_mul_(gradients, torch.where(found > 0.0, self.norm / found, 0.0).float())


class SignMask(Filter):
    """Disruption masking (MUDMAN, https://arxiv.org/abs/2506.12484): an entry of the forget gradient stays where its
    sign is that of the retain gradient's running mean, m <- decay m + (1 - decay) g; elsewhere it is 0."""

    def __init__(self, model: PreTrainedModel, decay: float):
        self._mean, self._decay = _Mean(model, lambda name, parameter: True), decay

    def state(self) -> dict[str, Tensor]:
        """See `Filter`."""
        return self._mean.state()

    @torch.no_grad()
    def __call__(self, term: str, trained: Gradients) -> None:
        for name, mean in self.state().items():
            gradient, mean = _rows(trained[name].grad), _rows(mean)
            if term == "retain":
                mean.lerp_(gradient, 1.0 - self._decay)
            elif term == "forget":
                gradient.mul_(mean.sign() == gradient.sign())


class Collapse(Filter):
    """Damp what many tokens share (RepSelect, https://arxiv.org/abs/2606.17168; CIR, https://arxiv.org/abs/2509.11816):
    of every matrix inside the blocks, the top `rank` singular directions of the forget gradient's running mean, whose
    factors are the top directions of output gradients and activations.

    The mean is gathered, with the gradient, at one rank a matrix, as Muon's directions are.
    """

    def __init__(self, model: PreTrainedModel, decay: float, rank: int, hard: bool):
        prefix = blocks_prefix(model)
        self._mean = _Mean(model, lambda name, parameter: name.startswith(prefix) and parameter.ndim == 2)
        self._decay, self._collapse = decay, partial(collapse, rank=rank, hard=hard)

    def state(self) -> dict[str, Tensor]:
        """See `Filter`."""
        return self._mean.state()

    @torch.no_grad()
    def __call__(self, term: str, trained: Gradients) -> None:
        if term != "forget":
            return
        pairs = []
        for name, mean in self.state().items():
            gradient = _rows(trained[name].grad)
            _rows(mean).lerp_(gradient, 1.0 - self._decay)
            shape, layout = trained[name].shape, layout_of(name, trained[name])
            pairs.append(_Pair(name, (shape[0], shape[1]), layout, gradient, _rows(mean), self._collapse))
        pipeline(run_round(layout, owned) for layout, owned in plan(pairs, world_size()))


def collapse(gradient: Tensor, mean: Tensor, *, rank: int, hard: bool) -> Tensor:
    """`gradient` [m, n] less what lies along the top singular directions u_i, v_i of `mean` [m, n], float32.

    With d_i = s_k / s_i, s_k the smallest of them, or 0 if `hard`: G <- G - sum_i (1 - d_i) G v_i v_i', then
    G <- G - sum_i (1 - d_i) u_i u_i' G. At most half of the directions, and none that is rounding.
    """
    if mean.shape[0] < mean.shape[1]:
        return collapse(gradient.T, mean.T, rank=rank, hard=hard).T
    squares, right = torch.linalg.eigh(mean.double().T @ mean.double())  # ascending
    rounding = squares[-1] * mean.shape[1] * torch.finfo(torch.float32).eps
    count = min(rank, mean.shape[1] // 2)
    count = min(count, int((squares > rounding).sum()))
    if count == 0:
        return gradient
    right, values = right[:, -count:], squares[-count:].sqrt()  # [n, k], [k]
    left = mean.double() @ right / values  # [m, k]
    share = torch.ones_like(values) if hard else 1.0 - values[0] / values
    result = gradient.double()
    result = result - (result @ right * share) @ right.T
    return (result - left @ (share[:, None] * (left.T @ result))).float()


@dataclass(frozen=True)
class _Pair:
    """A matrix's gradient and its mean, side by side on their way: rows [g, m] of twice the width."""

    name: str
    shape: tuple[int, int]
    layout: Layout
    gradient: Tensor
    mean: Tensor
    of_both: Callable[[Tensor, Tensor], Tensor]
    wire: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self.gradient.device

    @property
    def cost(self) -> int:
        short, long = sorted(self.shape)
        return 2 * short**2 * (long + 9 * short)  # the Gram matrix and its eigenvectors

    def elements(self, shard: int) -> int:
        return 2 * self.layout.rows(self.shape[0], shard) * self.shape[1]

    def advance(self, direction: Tensor | None) -> None:
        if direction is not None:
            torch.cat([self.gradient, self.mean], dim=1, out=direction.view(self.gradient.shape[0], -1))

    def compute(self, whole: list[Tensor]) -> Tensor:
        both = whole.pop().view(self.shape[0], 2, self.shape[1])
        return torch.stack([self.of_both(both[:, 0], both[:, 1]), both[:, 1]], dim=1).reshape(-1)

    def update(self, rows: Tensor) -> None:
        self.gradient.copy_(rows.view(self.gradient.shape[0], 2, -1)[:, 0])


class _Mean:
    """Room for a running mean of some trained parameters' gradients, laid out as they are."""

    def __init__(self, model: PreTrainedModel, wanted: Callable[[str, nn.Parameter], bool]):
        self._model, self._wanted, self._kept = model, wanted, dict[str, Tensor]()

    def state(self) -> dict[str, Tensor]:
        """By name; zeros at first. The model must have its weights."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and name not in self._kept and self._wanted(name, parameter):
                self._kept[name] = torch.zeros_like(parameter.detach())
        return self._kept


def _rows(tensor: Tensor | None) -> Tensor:
    """What this rank holds of a gradient, or of what is laid out like one."""
    assert tensor is not None, "every trained parameter has a gradient once it is summed over ranks"
    return local_rows(tensor)[0]
