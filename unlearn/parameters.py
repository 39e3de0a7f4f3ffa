"""Which parameters train: --train of full training, --lora-layers and --lora-targets of LoRA."""

import re

from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.model import blocks, blocks_prefix


def matching(model: PreTrainedModel, pattern: str) -> list[str]:
    """Names of the parameters in which a regular expression is found.

    Raises:
        UserError: in none; or it is no regular expression.
    """
    names = [name for name, _ in model.named_parameters()]
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"expected --train to be a regular expression; found {pattern!r}: {error}") from error
    if not found:
        inside = [name for name in names if name.startswith(blocks_prefix(model))]
        raise UserError(
            f"expected --train to be found in the name of a parameter, such as {names[0]} or {inside[-1]}; found "
            f"{pattern!r}, which is in none"
        )
    return found


def train_only(model: PreTrainedModel, pattern: str) -> None:
    """Freeze the parameters in whose names the pattern is not found; see `matching`."""
    kept = set(matching(model, pattern))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)


def lowest_block(model: PreTrainedModel, names: list[str]) -> int:
    """The lowest block that holds one of these parameters: -1 if the embedding is among them, the model's depth if they
    lie above all blocks."""
    prefix, embedding = blocks_prefix(model), model.get_input_embeddings().weight
    if any(parameter is embedding for name, parameter in model.named_parameters() if name in set(names)):
        return -1
    inside = [name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)]
    return min(map(int, inside), default=len(blocks(model)))
