"""Preference for not knowing (IDK with DPO, Maini et al. 2024, https://arxiv.org/abs/2401.06121; Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290): behind the beginning of a window of forget text, a refusal shall become likelier than
the rest of the window, both measured against the original.

    F = mean over windows of -(2 / b) log sigmoid(b [log p/p0(refusal | prompt) - log p/p0(rest | prompt)])

Log-probabilities are summed over tokens. Published for questions and answers; in plain text the prompt is the beginning
of a window. Published: b = 0.1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unlearn.batches import Rows, sent
from unlearn.config import OutputRetainFlags
from unlearn.errors import UserError
from unlearn.flags import flag
from unlearn.lora import set_dropout_rows
from unlearn.methods.retain import hold, through_both_heads
from unlearn.methods.terms import Cost, Needs, Parts, Plain, Term
from unlearn.model import final_hidden, softcap
from unlearn.output_losses import preference, sequence_loss, sequence_losses

TUNING = ("remove-coef=0.3,1,3", "beta=0.05,0.1,0.3")


@dataclass(frozen=True, kw_only=True)
class Flags(OutputRetainFlags):
    """Prefer a refusal to forget text, hold retain text."""

    remove_coef: float = flag(1.0, above=0.0)
    """Weight of the forget loss, a mean over windows. Published: 1."""
    beta: float = flag(0.1, above=0.0)
    """Inverse temperature b of a summed log-probability. Published: 0.1."""
    refusals: tuple[str, ...] = (" I don't know.", " I have no information about that.", " I am not sure about this.")
    """Texts to prefer; each window has one of them, drawn by the seed."""
    prompt: int = flag(32, least=1)
    """Tokens of a window that are the prompt; half of it, if it is shorter than two prompts."""

    def check_method(self) -> None:
        """Raise unless there is something to prefer, to the whole of a text."""
        if not self.refusals or not all(text.strip() for text in self.refusals):
            raise UserError(f"expected --refusals to be texts, none of them empty; found {self.refusals}")
        if self.forget_mask is not None:  # type: ignore[attr-defined]  # of the whole configuration
            raise UserError("--forget-mask has no effect with --method idk, which prefers one text to another")


def terms(flags: Flags, parts: Parts) -> list[Term]:
    """The forget term, and the retain term if it has a weight."""
    model, cap = parts.model, softcap(parts.model)
    refusals = [torch.tensor(parts.tokens(text), dtype=torch.int64, device=parts.device) for text in flags.refusals]

    def prefer(rows: Rows) -> Cost:
        both, count = pairs(rows, refusals, flags.prompt), rows.input_ids.shape[0]
        with torch.no_grad(), parts.original() as original:
            kept = final_hidden(original, both.input_ids, both.at_leading)
        set_dropout_rows(model, both.keys)  # twice as many as the trainer knows of
        hidden = final_hidden(model, both.input_ids, both.at_leading)

        def read(live: Tensor, matrix: Tensor, kept: Tensor, kept_matrix: Tensor) -> Tensor:
            before = sequence_losses(kept, kept_matrix, both, cap)

            def loss(nll: Tensor) -> Tensor:
                lost = nll - before  # -log p/p0 of the rest of each window, and then of each refusal
                return preference(lost[:count] - lost[count:], flags.beta)

            return sequence_loss(live, matrix, both, loss, softcap=cap)

        return Plain(through_both_heads(model, hidden, original, kept, read))

    longest = max(map(len, refusals))
    share = (flags.prompt + longest) / flags.seq_len  # type: ignore[attr-defined]  # of the whole configuration
    needs = Needs(original=True, apart=True, width=2.0, more_forward=2 * share, more_backward=share)
    forget = Term("forget", parts.batches["forget"], prefer, lambda s: flags.remove_coef, needs)
    return [forget, *hold(flags, parts, ())]


def pairs(rows: Rows, refusals: list[Tensor], prompt: int) -> Rows:
    """2 B rows: the windows, of which what follows the prompt counts, and behind the same prompts the refusals."""
    device, (count, width) = rows.input_ids.device, rows.input_ids.shape
    ahead = [min(prompt, size // 2) for size in rows.sizes]
    chosen = [refusals[key % len(refusals)] for key in rows.host_keys]
    behind = [torch.cat([rows.input_ids[row, :first], chosen[row]]) for row, first in enumerate(ahead)]
    whole = max(width, *map(len, behind))
    ids = torch.zeros(2 * count, whole, dtype=torch.int64, device=device)
    ids[:count, :width] = rows.input_ids
    leading = [torch.empty(0, dtype=torch.int64)]
    for row, (size, first) in enumerate(zip(rows.sizes, ahead, strict=True)):
        leading.append(row * whole + torch.arange(max(0, first - 1), max(0, size - 1)))
    for row, (size, first) in enumerate(zip(rows.sizes, ahead, strict=True)):
        ids[count + row, : len(behind[row])] = behind[row]
        if size:
            leading.append((count + row) * whole + torch.arange(max(0, first - 1), len(behind[row]) - 1))
    return replace(rows, input_ids=ids, leading=sent(torch.cat(leading), device), keys=rows.keys.repeat(2))
