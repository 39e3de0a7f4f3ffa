"""The adapter and its requests against lm-eval's own HFLM, and against the model's plain logits."""

import random
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from evals_support import OracleModel, make_model, make_tokenizer
from tokenizers import normalizers
from torch import nn
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.evals.harness.encode import encode_pairs
from unlearn.evals.harness.lm import LiveModel
from unlearn.evals.harness.requests import make_plan

CONTEXT = "Which planet is red?\nA. fox\nB. dog\nAnswer:"
PAIRS = [
    *[(CONTEXT, f" {letter}") for letter in "ABCD"],
    (CONTEXT, " the quick brown fox"),
    (CONTEXT, " the quick brown dog"),
    ("A context that ends in spaces  ", "again"),
    ("", " an empty context"),
    ("", "<|endoftext|> after the prefix token"),
    ("<|endoftext|>The fox", " jumps"),
    ("<s>The fox", " jumps"),
    ("over the lazy dog " * 12, " and again, over and over"),
    ("x", " y"),
]


def requests(pairs: list[tuple[str, str]]) -> list[Any]:
    return [SimpleNamespace(args=pair, task_name="test") for pair in pairs]


def hflm_scores(model: PreTrainedModel, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    return reference.loglikelihood(requests(pairs), disable_tqdm=True)


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("positions", [256, 24], ids=["whole", "truncated"])
@pytest.mark.parametrize("kind", ["neox", "llama", "gemma2"])
def test_log_likelihoods_equal_hflm(kind: str, positions: int, bos: bool) -> None:
    tokenizer, model = make_tokenizer(bos=bos), make_model(kind, positions=positions)
    expected = hflm_scores(model, tokenizer, PAIRS)
    live = LiveModel(model, tokenizer, batch_tokens=100, truncate=positions == 24)
    found = live.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # float32 matrix products of other batch shapes round differently: 2^-24 of a score at each of some sixteen products
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=2**-20, abs=1e-5)
    assert (live.plans[0].truncated > 0) == (positions == 24)


def test_greedy_continuation_is_recognised() -> None:
    tokenizer = make_tokenizer()
    live = LiveModel(OracleModel(tokenizer), tokenizer)
    pairs = [(f"The answer is #{letter}:", continuation) for letter in "AC" for continuation in (" A", " C", " C A")]
    scores = live.loglikelihood(requests(pairs), disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [True, False, False, False, True, False]


def test_four_letters_share_one_row_and_shared_rows_score_their_own_tails() -> None:
    """Two requests whose context + continuation agree up to the last token share a row, though they split elsewhere."""
    tokens = [([1, 2, 3], [token]) for token in (4, 5, 6, 7)] + [([1], [2, 3, 8]), ([1, 2], [3, 9])]
    plan = make_plan(tokens, max_length=10, batch_tokens=100)
    ((row,),) = plan.batches
    assert row.tokens == (1, 2, 3) and row.scored == 3
    assert [index for index, _ in row.requests] == [0, 1, 2, 3, 4, 5]
    ids, model = torch.tensor([[1, 2, 3]]), make_model("llama")
    live = LiveModel(model, make_tokenizer())
    scores = torch.zeros(6, 2, dtype=torch.float64)
    with torch.no_grad():
        live._score_batch([row], scores)
        log_probabilities = F.log_softmax(model(ids).logits[0], dim=-1)
    expected = [sum(log_probabilities[3 - len(c) + i, t].item() for i, t in enumerate(c)) for _, c in tokens]
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_batches_keep_to_the_budget_and_hold_every_request_once() -> None:
    generator = random.Random(0)
    pairs = [([generator.randrange(50) for _ in range(generator.randrange(1, 40))], [1, 2]) for _ in range(200)]
    plan = make_plan(pairs, max_length=30, batch_tokens=64, truncate=True)
    for batch in plan.batches:
        assert len(batch) == 1 or len(batch) * max(len(row.tokens) for row in batch) <= 64
    assert sorted(index for batch in plan.batches for row in batch for index, _ in row.requests) == list(range(200))
    lengths = [len(row.tokens) for batch in plan.batches for row in batch]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) == 30


def test_order_of_requests_does_not_change_batches() -> None:
    pairs = [([i % 7, i % 5, i], [1]) for i in range(50)]
    shapes = []
    for order in (pairs, pairs[::-1]):
        plan = make_plan(order, max_length=10, batch_tokens=12)
        shapes.append([[row.tokens for row in batch] for batch in plan.batches])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
def test_head_is_float32_in_bfloat16_computation(dtype: torch.dtype) -> None:
    """In bfloat16 the logits themselves are rounded to 8 bits, and the letters of a uniform model tie."""
    tokenizer, model = make_tokenizer(), make_model("neox", dtype=dtype)
    hidden: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(lambda *args: hidden.append(args[2].last_hidden_state))
    live = LiveModel(model, tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        ((score, _),) = live.loglikelihood(requests([(CONTEXT, " A")]), disable_tqdm=True)
        assert live.dtypes() == {"weights": [str(dtype)[6:]], "compute": ["bfloat16"], "head": ["float32"]}
    handle.remove()
    logits = hidden[0][0, -1].float() @ model.get_output_embeddings().weight.float().T
    (token,) = tokenizer.encode(" A")
    assert score == pytest.approx(F.log_softmax(logits, dim=-1)[token].item(), abs=1e-5)
    assert model.get_output_embeddings().forward.__func__ is nn.Linear.forward, "the head has its own forward back"


def test_adapted_head_runs_its_own_forward() -> None:
    class Doubled(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base = base

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2.0 * self.base(hidden)

    tokenizer, model = make_tokenizer(), make_model("llama")
    model.lm_head = Doubled(model.lm_head)
    ((score, _),) = LiveModel(model, tokenizer).loglikelihood(requests([(CONTEXT, " A")]), disable_tqdm=True)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(CONTEXT)])).logits[0, -1]
    (token,) = tokenizer.encode(" A")
    assert score == pytest.approx(F.log_softmax(logits, dim=-1)[token].item(), abs=1e-5)


def test_flags_random_state_and_gradients_are_untouched() -> None:
    tokenizer, model = make_tokenizer(), make_model("neox")
    model.train()
    model.gpt_neox.layers[0].eval()
    flags = [module.training for module in model.modules()]
    states = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()]
    live = LiveModel(model, tokenizer)
    first = live.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert live.loglikelihood(requests(PAIRS), disable_tqdm=True) == first, "dropout is off"
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (numpy.random.get_state()[1] == states[2]).all()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_flags_and_head_come_back_after_an_error() -> None:
    tokenizer, model = make_tokenizer(), make_model("neox")
    model.train()
    handle = model.gpt_neox.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LiveModel(model, tokenizer).loglikelihood(requests(PAIRS), disable_tqdm=True)
    handle.remove()
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
    assert "forward" not in vars(model.get_output_embeddings())


def test_nan_is_an_error_that_names_the_task() -> None:
    model = make_model("neox")
    model.gpt_neox.final_layer_norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="found NaN in 13 of 13 .first in task test"):
        LiveModel(model, make_tokenizer()).loglikelihood(requests(PAIRS), disable_tqdm=True)


def test_continuations_without_tokens_or_too_long_are_refused() -> None:
    with pytest.raises(UserError, match="at least one token"):
        encode_pairs(make_tokenizer(), [("The fox", "")])
    with pytest.raises(UserError, match="at most 4 tokens"):
        make_plan([([1], [1, 2, 3, 4, 5])], max_length=4, batch_tokens=100)
    with pytest.raises(UserError, match="--batch-tokens above 0"):
        LiveModel(make_model("neox"), make_tokenizer(), batch_tokens=0)


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_end_tokens_are_no_part_of_an_answer(bos: bool) -> None:
    """A tokenizer that puts an end token after every text made all four letters that same token: 99 % became 25 %."""
    assert make_tokenizer(bos=bos, end=True).encode("fox")[-1] == make_tokenizer().eos_token_id
    ends, plain = make_tokenizer(bos=bos, end=True), make_tokenizer(bos=bos)
    assert encode_pairs(ends, PAIRS) == encode_pairs(plain, PAIRS)
    model = make_model("llama")
    found = [
        LiveModel(model, tokenizer).loglikelihood(requests(PAIRS), disable_tqdm=True) for tokenizer in (ends, plain)
    ]
    assert found[0] == found[1]
    texts = ["The fox jumps", "over the lazy dog"]
    asked: Any = [SimpleNamespace(args=(text,), task_name="test") for text in texts]
    sums = [LiveModel(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True) for tokenizer in (ends, plain)]
    assert sums[0] == sums[1]


def test_every_context_is_encoded_with_every_answer() -> None:
    """A sample of contexts with the same last line stood for all, but a tokenizer may look further back."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("q\nAnswer: B", "q\nAnswer: fox")
    contexts = [f"{letter}\nAnswer:" for letter in "abcdefghijqklmnop"]
    pairs = [(context, continuation) for context in contexts for continuation in (" A", " B")]
    for (context, continuation), (start, rest) in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        assert start == tokenizer.encode(context)
        assert rest == tokenizer.encode(context + continuation)[len(start) :]
