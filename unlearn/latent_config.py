"""The flags of `unlearn/latent_attack.py`. Imports no torch."""

from dataclasses import dataclass

from unlearn.errors import UserError
from unlearn.flags import Only, flag

ATTACKS_LATENTS = Only(lambda config: config.latent_attack > 0, "without --latent-attack")
OTHER_ROWS = ("idk", "ignorant-teacher")  # methods whose forget loss puts other rows through the model
WITHOUT = ("next-token", "reset")  # methods that have no forget loss


@dataclass(frozen=True, kw_only=True)
class LatentFlags:
    """What is done to the residual stream of forget text before the forget loss reads it."""

    latent_attack: int = flag(0, least=0)
    """Latent adversarial training: so many steps of an attack on the residual stream of forget text, which looks for
    the perturbation under which the model predicts that text best. The forget loss is taken there. Published: 16."""
    latent_layers: tuple[int, ...] = flag((), only=ATTACKS_LATENTS)
    """Layers l at which it perturbs the stream that enters block l. Default: the method's --layers, or else 0, the
    embedding's. Published: 7 of 32, for unlearning."""
    latent_lr: float | None = flag(published=5e-2, above=0.0, only=ATTACKS_LATENTS)
    """Learning rate of the attack, which is Adam's. Published: 5e-2."""
    latent_radius: float | None = flag(published=2.0, above=0.0, only=ATTACKS_LATENTS)
    """Greatest 2-norm of a perturbation of one token at one layer. Depends on the model: compare it with the norm of
    its residual stream. Published: 2, for unlearning Zephyr-7B."""

    def check_latent(self) -> None:
        """Raise unless the method has a forget loss that an attack on its forget text can reach."""
        if not self.latent_attack:
            return
        method = self.method  # type: ignore[attr-defined]  # of the whole configuration
        if method in OTHER_ROWS:
            raise UserError(
                f"expected no --latent-attack with --method {method}, whose forget loss reads other rows too; found "
                "one: leave it out"
            )
        if method in WITHOUT or "forget" in self.unread:  # type: ignore[attr-defined]
            raise UserError(f"--latent-attack has no effect with --method {method} without a forget loss: leave it out")
