"""lm-eval's model interface over a live `transformers` model, on any number of ranks.

lm-eval is told rank 0 of 1 on *every* rank; the work is dealt out inside `loglikelihood` and its like, and every rank
gets all results. Shapes: B rows, S tokens, D hidden size, N scored positions, V vocabulary.

Communication of one pass: one all-reduce of the plan's checksum, then no collective of our own until one all-reduce of
the scores in float64. Each score is computed on one rank and is zero elsewhere, so the sum is exact and the result is
the same, bit for bit, on any number of ranks. Generation asks after each token whether every rank has finished, and
gathers the texts at the end.
"""

import zlib
from collections.abc import Iterator, Sequence
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.distributed import all_sum, all_true, rank, world_size
from unlearn.errors import NotFinite, UserError
from unlearn.evals.harness.encode import encode_strings, prefix_token
from unlearn.evals.harness.generate import Writing, batch_writings, make_writings, write_greedily
from unlearn.evals.harness.requests import Plan, Planner, Row
from unlearn.losses import logits_of
from unlearn.model_config import check_rows
from unlearn.progress import progress

DEFAULT_MAX_LENGTH = 2048  # where neither config nor tokenizer says, as in lm-eval
DEFAULT_LONGEST = 256  # tokens to generate where a task does not say, as in lm-eval
QUESTIONS = "the evaluation's questions"  # for messages
SOFTMAX_ROWS = 256  # of logits whose exponentials are summed at a time


class LiveModel(TemplateLM):
    """Log-likelihoods and texts of a model that may be in the middle of its training, plain or sharded with FSDP2.

    Only the root module is called, so a sharded model gathers and frees its weights as in training. Gradients, random
    state and the training flags of all modules are left as they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 16384,
        truncate: bool = False,
        planner: Planner | None = None,
    ):
        """Wrap `model`.

        Args:
            batch_tokens: rows x longest row of one forward pass of one rank.
            truncate: cut contexts that are longer than the model's from the left, instead of raising.
            planner: a planner from an earlier evaluation, so that the same questions are not tokenised again; its
                tokenizer, batch size and `truncate` then hold.
        """
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.planner = planner or Planner(tokenizer, batch_tokens, truncate=truncate)
        self.max_length = context_length(model.config, tokenizer)
        self.plans: list[Plan] = []
        self.truncated_contexts = 0  # of texts to be generated
        self.tokens: dict[tuple[str, str], int] = {}  # how many tokens each continuation has
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
        pairs = [request.args for request in requests]
        plan = self.planner.plan(pairs, self.max_length)
        self.tokens.update(zip(pairs, map(len, plan.continuations), strict=True))
        scores = self._run(plan, shown=not disable_tqdm)
        _check_finite(scores[:, 0], [request.task_name for request in requests])
        return [(score, wrong == 0.0) for score, wrong in scores.tolist()]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token given what fits of those before it.

        Texts longer than the model's context are cut into windows of that length, as lm-eval cuts them: each token is
        scored once, the first of a window after one token of the window before.

        Args:
            requests: lm-eval `Instance`s with `args = (text,)`, the same on every rank.

        Returns:
            natural logarithm of the probability per request, the same on every rank.

        Raises:
            UserError: as `loglikelihood`.
        """
        texts = [request.args[0] for request in requests]
        plan, owners = self.planner.plan_rolling(texts, self.max_length)
        scores = self._run(plan, shown=not disable_tqdm)[:, 0]
        sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, torch.tensor(owners), scores)
        _check_finite(sums, [request.task_name for request in requests])
        return sums.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations of contexts, each up to the first of its stop strings.

        Args:
            requests: lm-eval `Instance`s with `args = (context, generation_kwargs)`, the same on every rank.

        Returns:
            a text per request, the same on every rank.

        Raises:
            UserError: a task asks for sampling or beams, or the ranks planned different work.
        """
        contexts = [request.args[0] for request in requests]
        encoded = self.planner.contexts(contexts)
        check_rows(self.model.config, {QUESTIONS: self.planner.largest})
        writings = make_writings(
            self.tokenizer,
            [encoded[context] for context in contexts],
            [request.args[1] for request in requests],
            max_length=self.max_length,
            default_longest=DEFAULT_LONGEST,
            truncate=self.planner.truncate,
        )
        self.truncated_contexts += sum(writing.truncated for writing in writings)
        batches = batch_writings(writings, self.planner.batch_tokens)
        self._check_agreement(zlib.crc32(repr(batches).encode()))
        with evaluating(self.model):
            found = self._write(batches, shown=not disable_tqdm)
        return [text for _, text in sorted(_gathered(found))]

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

    def _check_agreement(self, checksum: int) -> None:
        """Raise on all ranks if any two planned different work: they would wait for each other for ever."""
        if world_size() == 1:
            return
        extremes = torch.tensor([checksum, -checksum], device=self._device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            raise UserError(
                "expected the same questions on every rank; found ranks that disagree: "
                "give all nodes the same data, tokenizer and --batch-tokens"
            )

    def _run(self, plan: Plan, shown: bool) -> Tensor:
        """float64 [requests, 2] on the CPU: log-likelihood, and how many tokens greedy decoding writes otherwise."""
        self._check_agreement(plan.checksum)
        check_rows(self.model.config, {QUESTIONS: plan.largest})
        self.plans.append(plan)
        scores = torch.zeros(plan.requests, 2, dtype=torch.float64)
        total = sum(map(len, plan.batches))
        bar = progress(total, "Evaluating", "row", shown=shown)
        with evaluating(self.model), bar:
            for mine, group in _dealt(plan.batches):
                if mine is not None:
                    self._score_batch(mine, scores)
                else:  # a sharded model needs every rank in every forward pass
                    self._logits([Row((0,), 1)])
                bar.update(sum(map(len, group)))
        return all_sum(scores.to(self._device)).cpu()

    def _write(self, batches: list[list[Writing]], shown: bool) -> list[tuple[int, str]]:
        """The texts of this rank's batches, with the index of their requests."""
        found: list[tuple[int, str]] = []
        total = sum(map(len, batches))
        bar = progress(total, "Generating", "text", shown=shown)
        with bar:
            for mine, group in _dealt(batches):
                texts = write_greedily(
                    self._next_tokens,
                    self.tokenizer,
                    mine or [],
                    self._device,
                    self._end_tokens(),
                    lambda done: all_true(done, self._device),
                )
                found += zip([one.index for one in mine or []], texts, strict=True)
                bar.update(sum(map(len, group)))
        return found

    def _end_tokens(self) -> frozenset[int]:
        """The tokens that end a text: the tokenizer's, and those of the model's generation config."""
        configured = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in [self.tokenizer.eos_token_id, *listed] if token is not None)

    def _next_tokens(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The likeliest next token of each row, int64 [B], and the keys and values so far; see `generate.Step`."""
        rows = torch.arange(len(ids), device=self._device)
        with float32_head(self.model.get_output_embeddings(), rows, torch.full_like(rows, ids.shape[1] - 1)):
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        return output.logits[0].argmax(dim=-1), output.past_key_values

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
        logits = self._logits(rows)
        # One number a row, some rows at a time: log-softmax would need a second [N, V].
        total = torch.cat([part.logsumexp(dim=-1) for part in logits.split(SOFTMAX_ROWS)])  # [N]
        greedy, where = logits.argmax(dim=-1), positions.to(self._device)
        chosen = (logits[where, tokens.to(self._device)] - total[where]).cpu().double()
        wrong = (greedy.cpu()[positions] != tokens).double()
        # On the CPU, where index_add_ sums in one fixed order.
        scores.index_add_(0, requests, torch.stack([chosen, wrong], dim=1))

    def _logits(self, rows: list[Row]) -> Tensor:
        """The next token's logits at the scored positions of `rows`: float32 [N, V]."""
        width = max(len(row.tokens) for row in rows)
        # Padding on the right is never attended to by what comes before it, so it needs no mask and may be any token.
        padded = [row.tokens + (row.tokens[-1],) * (width - len(row.tokens)) for row in rows]
        where = [(i, p) for i, row in enumerate(rows) for p in range(len(row.tokens) - row.scored, len(row.tokens))]
        input_ids = torch.tensor(padded, device=self._device)  # [B, S]
        row, position = torch.tensor(where, device=self._device).unbind(1)  # [N] each
        with float32_head(self.model.get_output_embeddings(), row, position):
            return self.model(input_ids=input_ids, use_cache=False).logits[0].float()  # [N, V]


def context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest row in tokens that a model takes, as lm-eval reads it off its configuration or tokenizer."""
    return resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH)


def _dealt(batches: Sequence[list[Any]]) -> Iterator[tuple[list[Any] | None, Sequence[list[Any]]]]:
    """This rank's batch (None: nothing left) of each group of batches that the ranks run at the same time."""
    ranks, mine = world_size(), rank()
    for first in range(0, len(batches), ranks):
        group = batches[first : first + ranks]
        yield (group[mine] if mine < len(group) else None), group


def _gathered(mine: list[Any]) -> list[Any]:
    """The items of all ranks."""
    if world_size() == 1:
        return mine
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def _check_finite(scores: Tensor, tasks: list[str]) -> None:
    bad = scores.isnan().nonzero().flatten().tolist()
    if bad:
        raise NotFinite(
            f"expected numbers as log-likelihoods; found NaN in {len(bad)} of {len(tasks)} (first in task "
            f"{tasks[bad[0]]}): the model's weights or activations are broken"
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
    original, replaced = head.forward, vars(head).get("forward")

    def forward(hidden: Tensor) -> Tensor:
        scored = hidden[row, position].unsqueeze(0)  # [1, N, D]
        if not _is_linear(head):  # an adapted head keeps its own dtype
            return original(scored)
        parameters = dict(head.named_parameters())
        bias = parameters["bias"].float() if "bias" in parameters else None
        with torch.autocast(hidden.device.type, enabled=False):  # which would bring the product back to bfloat16
            if hidden.is_cuda and bias is None and scored.dtype == parameters["weight"].dtype:
                return logits_of(scored, parameters["weight"])  # without a copy of the head in float32
            return F.linear(scored.float(), parameters["weight"].float(), bias)  # [1, N, V]

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def _is_linear(head: nn.Module) -> bool:
    return type(head).forward is nn.Linear.forward


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
