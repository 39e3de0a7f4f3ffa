"""The flags of `unlearn/budget.py`. Imports no torch."""

import math
from dataclasses import dataclass

from unlearn.errors import UserError
from unlearn.flags import Only, flag

MEASURED = ("kl", "loss")  # on held-out retain text; other budgets are of tasks
STOPS = Only(lambda config: bool(config.stop_at), "without --stop-at")
MEASURES = Only(lambda config: config.measures_damage, "without --measure-damage and --stop-at kl or loss")


@dataclass(frozen=True, kw_only=True)
class BudgetFlags:
    """When a run ends before its last step, because it has done as much damage as it may."""

    stop_at: tuple[str, ...] = ()
    """Budgets of damage, at the first of which to be used up the run ends: kl=0.005, KL(original || model) a token in
    nats; loss=0.01, what the next-token loss has risen by, in nats; both on retain text that is not trained on. Or
    TASK=0.4: the accuracy below which one of --eval-tasks may not fall."""
    stop_every: int = flag(1, least=1, only=STOPS)
    """Optimizer steps between looks at the budgets."""
    measure_damage: bool = False
    """Measure kl and loss after the last step too, whether a budget is set or not, and write them to run.json."""
    stop_windows: int = flag(64, least=1, only=MEASURES)
    """Windows of retain text, beyond those of --examples, on which kl and loss are measured."""

    @property
    def budgets(self) -> dict[str, float]:
        """Each budget by its name."""
        return {name: float(most) for name, _, most in (word.partition("=") for word in self.stop_at)}

    @property
    def damage_budgets(self) -> dict[str, float]:
        """Those of damage on held-out retain text."""
        return {name: most for name, most in self.budgets.items() if name in MEASURED}

    @property
    def measures_damage(self) -> bool:
        """Whether any damage on held-out retain text is measured."""
        return self.measure_damage or bool(self.damage_budgets)

    @property
    def task_budgets(self) -> dict[str, float]:
        """Those of a task's accuracy, which may not fall below them."""
        return {name: least for name, least in self.budgets.items() if name not in MEASURED}

    def check_budgets(self) -> None:
        """Raise unless each is a name with a number above 0, named once, and can be measured."""
        for word in self.stop_at:
            name, _, most = word.partition("=")
            if not name or not _is_above_0(most):
                raise UserError(f"expected --stop-at as NAME=NUMBER, above 0, such as kl=0.005; found {word!r}")
            if name not in (*MEASURED, *self.eval_tasks):  # type: ignore[attr-defined]  # of the whole configuration
                raise UserError(f"expected --stop-at kl, loss or one of --eval-tasks; found {name!r}")
        if self.measures_damage and not getattr(self, "retain_coef", None):
            flag = "--measure-damage" if self.measure_damage else f"--stop-at {min(self.damage_budgets)}"
            raise UserError(f"expected a retain loss beside {flag}, on whose text it is measured; found none")
        if len(self.budgets) < len(self.stop_at):
            raise UserError(f"expected each budget of --stop-at once; found {' '.join(self.stop_at)}")


def _is_above_0(word: str) -> bool:
    try:
        return 0.0 < float(word) < math.inf
    except ValueError:
        return False
