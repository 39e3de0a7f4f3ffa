"""lm-eval's model interface over a live `transformers` model, on any number of ranks.

lm-eval is told rank 0 of 1 on *every* rank; the work is dealt out inside `loglikelihood`, and every rank gets all
results. Shapes: B rows, S tokens, D hidden size, N scored positions, V vocabulary.

Communication of one pass: one all-reduce of the plan's checksum, then no collective of our own until one all-reduce of
the scores in float64. Each score is computed on one rank and is zero elsewhere, so the sum is exact and the result is
the same, bit for bit, on any number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import resolve_max_length
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.plan import Plan, Planner, Row, encode_strings, prefix_token
from unlearn.distributed import all_sum, is_main, rank, world_size
from unlearn.errors import UserError

DEFAULT_MAX_LENGTH = 2048  # where neither config nor tokenizer says, as in lm-eval
SOFTMAX_ROWS = 256  # log-softmax a few rows at a time: it needs a second copy of [rows, V]

_ONLY_CHOICES = "expected a multiple-choice task; found one that {}: only multiple-choice tasks are supported"


class LiveModel(TemplateLM):
    """Log-likelihoods of a model that may be in the middle of its training, plain or sharded with FSDP2.

    Only the root module is called, so a sharded model gathers and frees its weights as in training. Gradients, random
    state and the training flags of all modules are left as they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 16384,
        max_length: int | None = None,
        planner: Planner | None = None,
    ):
        """Wrap `model`.

        Args:
            batch_tokens: rows x longest row of one forward pass of one rank.
            max_length: longest row in tokens; None takes the model's own.
            planner: a planner from an earlier evaluation, so that the same questions are not tokenised again; its
                tokenizer and batch size then hold.
        """
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.planner = planner or Planner(tokenizer, batch_tokens)
        self.max_length = max_length or resolve_max_length(model.config, tokenizer, default=DEFAULT_MAX_LENGTH)
        self.plan: Plan | None = None
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        return prefix_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of one string; `add_special_tokens=None` adds BOS unless the string brings it."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return encode_strings(self.tokenizer, [string])[string]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it.

        Args:
            requests: lm-eval `Instance`s with `args = (context, continuation)`, the same on every rank.

        Returns:
            (natural logarithm of the probability, is_greedy) per request, the same on every rank.

        Raises:
            UserError: ranks planned different work, or a log-likelihood is NaN.
        """
        plan = self.plan = self.planner.plan([request.args for request in requests], self.max_length)
        self._check_agreement(plan)
        scores = self._score(plan, progress=is_main() and not disable_tqdm)
        self._check_finite(requests, scores)
        return [(score, wrong == 0.0) for score, wrong in scores.tolist()]

    def dtypes(self) -> dict[str, list[str]]:
        """Types of the weights, of the products in the blocks, and of the unembedding's, for the record.

        The last is float32, unless the head is no plain linear layer.
        """
        weights = sorted({_name(parameter.dtype) for parameter in self.model.parameters()})
        kind = self._device.type
        compute = [_name(torch.get_autocast_dtype(kind))] if torch.is_autocast_enabled(kind) else weights
        head = ["float32"] if _is_linear(self.model.get_output_embeddings()) else compute
        return {"weights": weights, "compute": compute, "head": head}

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood does its own encoding and never comes here")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise UserError(_ONLY_CHOICES.format("measures perplexity"))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise UserError(_ONLY_CHOICES.format("generates text"))

    def _check_agreement(self, plan: Plan) -> None:
        """Raise on all ranks if any two planned different work: they would wait for each other for ever."""
        if world_size() == 1:
            return
        extremes = torch.tensor([plan.checksum, -plan.checksum], device=self._device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            raise UserError(
                "expected the same questions on every rank; found ranks that disagree: "
                "give all nodes the same data, tokenizer and --batch-tokens"
            )

    def _score(self, plan: Plan, progress: bool) -> Tensor:
        """float64 [requests, 2] on the CPU: log-likelihood, and how many tokens greedy decoding writes otherwise."""
        scores = torch.zeros(plan.requests, 2, dtype=torch.float64)
        ranks, mine = world_size(), rank()
        total = sum(map(len, plan.batches))
        bar = tqdm(total=total, unit="row", desc="Evaluating", leave=False, disable=not progress)
        with evaluating(self.model), bar:
            for first in range(0, len(plan.batches), ranks):
                group = plan.batches[first : first + ranks]
                if mine < len(group):
                    self._score_batch(group[mine], scores)
                else:  # a sharded model needs every rank in every forward pass
                    self._log_probabilities([Row((0,), 1)])
                bar.update(sum(map(len, group)))
        return all_sum(scores.to(self._device)).cpu()

    def _score_batch(self, rows: list[Row], scores: Tensor) -> None:
        """Add the scores of `rows` to `scores`, in place."""
        starts = [0, *accumulate(row.scored for row in rows)]  # where each row's positions lie among the N
        wanted = [
            (index, start + row.scored - len(tokens) + offset, token)
            for row, start in zip(rows, starts, strict=False)
            for index, tokens in row.requests
            for offset, token in enumerate(tokens)
        ]
        requests, positions, tokens = torch.tensor(wanted).unbind(1)  # [tokens of all continuations] each
        log_probabilities, greedy = self._log_probabilities(rows)
        chosen = log_probabilities[positions.to(self._device), tokens.to(self._device)].cpu().double()
        wrong = (greedy.cpu()[positions] != tokens).double()
        # On the CPU, where index_add_ sums in one fixed order.
        scores.index_add_(0, requests, torch.stack([chosen, wrong], dim=1))

    def _log_probabilities(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Next-token log-probabilities at the scored positions of `rows`: float32 [N, V], and their argmax [N]."""
        width = max(len(row.tokens) for row in rows)
        # Padding on the right is never attended to by what comes before it, so it needs no mask and may be any token.
        padded = [row.tokens + (row.tokens[-1],) * (width - len(row.tokens)) for row in rows]
        where = [(i, p) for i, row in enumerate(rows) for p in range(len(row.tokens) - row.scored, len(row.tokens))]
        input_ids = torch.tensor(padded, device=self._device)  # [B, S]
        row, position = torch.tensor(where, device=self._device).unbind(1)  # [N] each
        with float32_head(self.model.get_output_embeddings(), row, position):
            logits = self.model(input_ids=input_ids, use_cache=False).logits[0].float()  # [N, V]
        greedy = logits.argmax(dim=-1)
        for part in logits.split(SOFTMAX_ROWS):
            part.copy_(F.log_softmax(part, dim=-1))
        return logits, greedy

    def _check_finite(self, requests: list[Any], scores: Tensor) -> None:
        bad = scores[:, 0].isnan().nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"expected numbers as log-likelihoods; found NaN in {len(bad)} of {len(requests)} "
                f"(first in task {requests[bad[0]].task_name}): the model's weights or activations are broken"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass nothing else frees the root's gathered weights


@contextmanager
def float32_head(head: nn.Module, row: Tensor, position: Tensor) -> Iterator[None]:
    """Let the unembedding see only the scored positions, and multiply in float32.

    In bfloat16 the logits of a nearly uniform model tie, and ties go to the first letter. Whatever the model does with
    the logits afterwards (Gemma 2 soft-caps them) it then does in float32. The head is replaced by its `forward` only,
    so the root module's call, and with it FSDP2's hooks, stays what it is.

    Args:
        row, position: int64 [N], where in the hidden states [B, S, D] the scored positions are.
    """
    original = head.forward

    def forward(hidden: Tensor) -> Tensor:
        scored = hidden[row, position].unsqueeze(0)  # [1, N, D]
        if not _is_linear(head):  # an adapted head keeps its own dtype
            return original(scored)
        parameters = dict(head.named_parameters())
        bias = parameters["bias"].float() if "bias" in parameters else None
        with torch.autocast(hidden.device.type, enabled=False):  # which would bring the product back to bfloat16
            return F.linear(scored.float(), parameters["weight"].float(), bias)  # [1, N, V]

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _is_linear(head: nn.Module) -> bool:
    return type(head).forward is nn.Linear.forward


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
