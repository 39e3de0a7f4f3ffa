"""Plain language modelling: mean next-token cross-entropy, as a fine-tuning attack trains.

Published settings of the attack: https://arxiv.org/abs/2508.06601.
"""

from dataclasses import dataclass
from typing import Literal

from unlearn.config import ADAM, LORA
from unlearn.errors import UserError
from unlearn.flags import Only, flag
from unlearn.methods.retain import prediction
from unlearn.methods.terms import Parts, Phase, Term


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Fine-tune a model by the next tokens of its text: what an attack does, and what no unlearning is."""

    data: Literal["forget", "retain", "mix"] = "forget"
    """Text to train on: --forget; --retain; or mix, as many windows of either."""
    repair_steps: int = flag(0, least=0, only=Only(lambda config: config.data != "retain", "with --data retain"))
    """Optimizer steps on --retain before all others: an attack that first mends what unlearning has broken."""
    adam_lr: float | None = flag(published=2e-5, above=0.0, only=ADAM)
    """Peak learning rate of AdamW. Published: 2e-5."""
    lora_dropout: float | None = flag(published=0.0, least=0.0, below=1.0, only=LORA)
    """Probability of dropping an adapter's input. Default with LoRA: 0."""
    examples: int | None = flag(published=512, least=1)
    """Windows drawn from the text for an epoch. Published: 512."""
    batch: int = flag(16, least=1)
    """Windows of one optimizer step, over all ranks; all of --examples where they are fewer. Published: 16."""

    @property
    def unread(self) -> dict[str, str]:
        """The text that --data leaves out, and that is no repair."""
        read = ("forget", "retain") if self.data == "mix" else (self.data, *(["retain"] if self.repair_steps else []))
        return {other: f"with --data {self.data}" for other in ("forget", "retain") if other not in read}

    def check_method(self) -> None:
        """Raise unless a mix has windows of either text, and there are batches for a repair."""
        steps = self.steps  # type: ignore[attr-defined]  # of the whole configuration
        if steps is not None and self.repair_steps > steps:
            raise UserError(
                f"expected --repair-steps of at most --steps, for which there are batches, {steps}; found "
                f"{self.repair_steps}: lower it"
            )
        if self.data == "mix" and self.examples == 1:
            raise UserError("expected --examples of 2 or more for --data mix, half of either text; found 1: raise it")


def phases(flags: Flags, parts: Parts) -> list[Phase]:
    """The mean over every token of the global batch that has a next one; of retain text first, if it is to be."""
    cost = prediction(parts.model)
    main = Phase("", [Term("forget", parts.batches[flags.data], cost)])
    if flags.repair_steps == 0:
        return [main]
    repair = Phase("repair", [Term("retain", parts.batches["retain"], cost)], steps=flags.repair_steps)
    return [repair, Phase("attack", main.terms)]
