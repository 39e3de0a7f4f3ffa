"""The flags of `unlearn/filters.py`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from unlearn.errors import UserError
from unlearn.flags import Only, flag

NORMALISES = Only(lambda config: "normalise" in config.filter, "without --filter normalise")
COLLAPSES = Only(lambda config: "collapse" in config.filter, "without --filter collapse")
REMEMBERS = Only(
    lambda config: not {"collapse", "sign-mask"}.isdisjoint(config.filter), "without --filter sign-mask or collapse"
)


@dataclass(frozen=True, kw_only=True)
class FilterFlags:
    """What happens to the forget gradient before the optimizer sees it."""

    filter: tuple[Literal["normalise", "sign-mask", "collapse"], ...] = ()
    """What happens to the forget gradient before it is added to the retain gradient, in this order. normalise: it gets
    a fixed norm; sign-mask (MUDMAN): entries whose sign is not that of the retain gradient's running mean are dropped;
    collapse (RepSelect, CIR): the top singular directions of its own running mean, matrix by matrix, are damped."""
    filter_norm: float | None = flag(published=0.1, above=0.0, only=NORMALISES)
    """Norm that the forget gradient gets. Published: 0.1 for MUDMAN, 0.2 for CIR."""
    filter_decay: float | None = flag(published=0.9, least=0.0, below=1.0, only=REMEMBERS)
    """Share of the running mean that stays at each step. Published: 0.9 for MUDMAN."""
    filter_rank: int | None = flag(published=400, least=1, only=COLLAPSES)
    """Singular directions to damp, at most half of a matrix's. Published: 400 for RepSelect, 23 to 35 for CIR."""
    filter_hard: bool = flag(False, only=COLLAPSES)
    """Remove those directions (CIR) instead of damping each down to the smallest of them (RepSelect)."""

    def check_filter(self) -> None:
        """Raise unless every filter has what it works on."""
        if len(set(self.filter)) < len(self.filter):
            raise UserError(f"expected every name after --filter once; found {' '.join(self.filter)}")
        for name in ("sign-mask", "collapse"):
            if name in self.filter and self.lora_rank > 0:  # type: ignore[attr-defined]  # of the whole configuration
                raise UserError(
                    f"expected full training for --filter {name}, which looks at weights' gradients; found --lora-rank"
                )
        if "sign-mask" in self.filter and getattr(self, "retain_coef", None) in (0.0, None):
            raise UserError("expected a retain loss for --filter sign-mask to agree with; found none: give one")
