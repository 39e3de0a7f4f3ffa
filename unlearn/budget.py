"""--stop-at kl=..., loss=..., and --measure-damage: the damage on retain text that a run does not train on.

The damage is a mean over the held-out tokens: KL(original || model) in nats, and what the next-token loss has risen by.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unlearn.batches import Batches
from unlearn.budget_config import MEASURED
from unlearn.config import TrainConfig
from unlearn.corpus import Corpus
from unlearn.distributed import all_sum
from unlearn.errors import UserError
from unlearn.methods.retain import by_prediction, prediction
from unlearn.methods.terms import Hooks, Parts
from unlearn.precision import Precision
from unlearn.seeding import generator
from unlearn.sharding import reshard


@dataclass(frozen=True)
class Budget:
    """Some budgets of damage, and the text on which it is measured.

    Attributes:
        most: by name, `kl` or `loss`; infinite for what is only measured. every: optimizer steps between measurements.
        held_out: of one step, all of the windows. frozen: see `Loss`.
    """

    most: dict[str, float]
    every: int
    held_out: Batches
    parts: Parts
    precision: Precision
    frozen: Sequence[nn.Module]

    @property
    def can_end(self) -> bool:
        """Whether any damage is too much."""
        return any(most < math.inf for most in self.most.values())

    def measure(self) -> dict[str, float]:
        """The damage by name, as `held_out_<name>`. Every rank must call it, between optimizer steps."""
        model = self.parts.model
        model.eval()
        costs = {"kl": by_prediction(self.parts), "loss": prediction(model)}
        found = torch.zeros(len(self.most) + 1, dtype=torch.float64, device=self.parts.device)
        with torch.no_grad(), self.precision():
            for rows in self.held_out.micro_batches(0, self.parts.device):
                for index, name in enumerate(self.most):
                    found[index] += costs[name](rows).backward(0.0)[0]
                if "loss" in self.most:
                    with self.parts.original() as original:
                        found[-1] += prediction(original)(rows).backward(0.0)[0]
                for gathered in (model, *self.frozen):
                    reshard(gathered)
        *values, before = all_sum(found).tolist()
        damage = dict(zip(self.most, values, strict=True))
        if "loss" in damage:
            damage["loss"] -= before
        return {f"held_out_{name}": value for name, value in damage.items()}

    def exceeded(self, damage: dict[str, float]) -> str | None:
        """Which budget is used up, in words; None if none is."""
        for name, most in self.most.items():
            if damage[f"held_out_{name}"] > most:
                return f"--stop-at {name}={most:g}: {damage[f'held_out_{name}']:.6g} on held-out retain text"
        return None

    def check(self) -> None:
        """Raise if a budget is used up before the first step."""
        why = self.exceeded(self.measure()) if self.can_end else None
        if why is not None:
            raise UserError(f"expected damage below its budget before the first step; found {why}: raise it")

    def hooks(self) -> Hooks:
        """That end a phase; none where no budget can."""
        if not self.can_end:
            return Hooks()

        def stop(done: int, numbers: dict[str, float]) -> str | None:
            if done % self.every:
                return None
            damage = self.measure()
            numbers |= damage
            return self.exceeded(damage)

        return Hooks(stop=stop)


def budget_of(config: TrainConfig, parts: Parts, precision: Precision, frozen: Sequence[nn.Module]) -> Budget | None:
    """What is to be measured, on windows that --examples leaves; None if nothing is.

    Raises:
        UserError: too few windows are left.
    """
    if not config.measures_damage:
        return None
    trained = parts.batches["retain"]
    free = sorted(set(range(len(trained.corpus.windows))) - set(trained.order))
    if len(free) < config.stop_windows:
        raise UserError(
            f"expected {config.stop_windows:,} windows of retain text beside those that are trained on, for damage; "
            f"found {len(free):,}: lower --examples or --stop-windows, or give more text"
        )
    drawn = torch.randperm(len(free), generator=generator(config.seed, "held out"))[: config.stop_windows].tolist()
    corpus = Corpus(trained.corpus.name, len(drawn), [trained.corpus.windows[free[index]] for index in drawn])
    held_out = Batches(
        corpus,
        examples=len(drawn),
        total=len(drawn),
        batch=len(drawn),
        seed=config.seed,
        tag="held out",
        micro_batch=config.micro_batch,
        micro_tokens=config.micro_tokens,
    )
    most = dict.fromkeys(MEASURED, math.inf) if config.measure_damage else {}
    return Budget(most | config.damage_budgets, config.stop_every, held_out, parts, precision, frozen)
