"""How a command's flags are declared: its default, its range, and when it has an effect, beside each field; and the one
place where they are checked. Imports nothing heavy: `--help` and a wrong flag answer at once."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unlearn.errors import UserError


@dataclass(frozen=True)
class Only:
    """When a flag has an effect: `holds(config)`; and what to say of it otherwise, as in "has no effect ..."."""

    holds: Callable[[Any], bool]
    otherwise: str | Callable[[Any], str]

    def says(self, config: Any) -> str:
        """What to say of it otherwise."""
        return self.otherwise if isinstance(self.otherwise, str) else self.otherwise(config)


def flag(
    default: Any = None,
    *,
    published: Any = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    only: Only | tuple[Only, ...] = (),
) -> Any:
    """A field of a flags dataclass.

    Args:
        default: None if the flag was not given, where there is a `published` value.
        published: what None becomes where the flag has an effect: a value, or a function of the config.
        least, above, most, below: bounds of a number, inclusive and exclusive.
        infinite: whether infinity is a number too.
        only: when the flag has an effect; given otherwise, it is refused.
    """
    conditions = only if isinstance(only, tuple) else (only,)
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"published": published, "only": conditions, "bounds": bounds, "infinite": infinite}
    return dataclasses.field(default=default, metadata=metadata)


def by_mode(*, lora: Any, full: Any) -> Callable[[Any], Any]:
    """A published value that differs between LoRA and full training."""
    return lambda config: lora if config.lora_rank > 0 else full


def settle(config: Any) -> None:
    """Refuse flags without an effect, fill in published values, and check every number's range.

    Raises:
        UserError: the first flag that is wrong.
    """
    for name, otherwise in idle(config).items():
        raise UserError(f"{spelled(name)} has no effect {otherwise}: leave it out")
    fields = [field for field in dataclasses.fields(config) if "only" in field.metadata]
    for field in fields:
        published = field.metadata["published"]
        if getattr(config, field.name) is None and all(one.holds(config) for one in field.metadata["only"]):
            value = published(config) if callable(published) else published
            object.__setattr__(config, field.name, value)
    for field in fields:
        _check_range(field, getattr(config, field.name))


def idle(config: Any) -> dict[str, str]:
    """The flags that were given without an effect, each with what to say of it, as in "has no effect ..."."""
    return {
        field.name: condition.says(config)
        for field in dataclasses.fields(config)
        for condition in reversed(field.metadata.get("only", ()))
        if getattr(config, field.name) != field.default and not condition.holds(config)
    }


def _check_range(field: "dataclasses.Field[Any]", value: Any) -> None:
    bounds = field.metadata["bounds"]
    if value is None or all(bound is None for bound in bounds.values()):
        return
    holds = (
        (bounds["least"] is None or value >= bounds["least"])
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["most"] is None or value <= bounds["most"])
        and (bounds["below"] is None or value < bounds["below"])
        and (math.isfinite(value) or (field.metadata["infinite"] and value == math.inf))
    )
    if not holds:
        expected = _in_words(bounds, whole=isinstance(value, int), infinite=field.metadata["infinite"])
        raise UserError(f"expected {spelled(field.name)} to be {expected}; found {value}")


def _in_words(bounds: dict[str, float | None], *, whole: bool, infinite: bool) -> str:
    least, above, most, below = (bounds[name] for name in ("least", "above", "most", "below"))
    if (most, below) == (None, None):
        words = f"{least:g} or more" if least is not None else f"a number above {above:g}"
        return words + (", or inf" if infinite else "") if whole or above is not None else f"a finite number, {words}"
    low = f"[{least:g}" if least is not None else f"({above:g}" if above is not None else "(-inf"
    return f"a number in {low}, " + (f"{most:g}]" if most is not None else f"{below:g})")


def spelled(name: str) -> str:
    """A field's name as its flag."""
    return f"--{name.replace('_', '-')}"
