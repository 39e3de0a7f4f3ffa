"""The flags of `unlearn/adversary.py`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from unlearn.errors import UserError
from unlearn.flags import Only, flag
from unlearn.latent_config import WITHOUT

RELEARNS = Only(lambda config: config.adversary == "relearn", "without --adversary relearn")


@dataclass(frozen=True, kw_only=True)
class AdversaryFlags:
    """Against whom the forget loss is taken."""

    adversary: Literal["none", "relearn"] = "none"
    """relearn: LoRA adapters beside the model go on relearning the forget text, and the forget gradient is taken with
    them in place, so that unlearning also reaches what a fine-tuning attack would bring back. They are no part of
    what is exported, and the retain loss does not see them."""
    adversary_rank: int | None = flag(published=32, least=1, only=RELEARNS)
    """Rank of the adversary's adapters, on every linear layer of the blocks. Published: 32 (RepSelect)."""
    adversary_lr: float | None = flag(published=0.04, above=0.0, only=RELEARNS)
    """Learning rate of its SGD, one step after each of the optimizer's. Published: 0.04 (RepSelect)."""
    adversary_restart: int = flag(0, least=0, only=RELEARNS)
    """Steps after which it begins anew from the model as it then is. 0: never (RepSelect). Published for MUDMAN: 32."""

    def check_adversary(self) -> None:
        """Raise unless there is a forget loss, and blocks that adapters can be added to."""
        if self.adversary == "none":
            return
        method = self.method  # type: ignore[attr-defined]  # of the whole configuration
        if method in WITHOUT or "forget" in self.unread:  # type: ignore[attr-defined]
            raise UserError(f"--adversary has no effect with --method {method} without a forget loss: leave it out")
        if self.compile_blocks:  # type: ignore[attr-defined]
            raise UserError("expected no --compile-blocks beside --adversary, which enters the blocks; found both")
