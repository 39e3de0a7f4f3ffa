"""The methods that push on predictions, each against a naive twin: whole logits, row by row, float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from test_phases import settings
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from unlearn.assemble import Unlearning, build
from unlearn.batches import pad
from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.lora import adapters
from unlearn.methods.idk import pairs
from unlearn.model import load_model, save_model
from unlearn.trainer import gradients
from unlearn.weights import local_rows

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")
LAST = 3  # the step whose batch is short

Logits = Callable[[Tensor], Tensor]  # int64 [S] -> float64 logits [S, V]


def nll(logits: Logits, ids: Tensor) -> Tensor:
    return -logits(ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def wga(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    losses = nll(model, ids)
    return -((-losses).exp().detach() ** flags.beta) * losses


def npo(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    ratio = nll(original, ids).sum() - nll(model, ids).sum()  # log p(x) / p0(x)
    return -2 / flags.beta * logsigmoid(-flags.beta * ratio)[None]


def simnpo(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    return -2 / flags.beta * logsigmoid(flags.beta * (nll(model, ids).mean() - flags.margin))[None]


def undial(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    target = original(ids)[:-1].clone()
    target[torch.arange(len(ids) - 1), ids[1:]] -= flags.beta
    return kl(target, model(ids)[:-1])


def max_entropy(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    logits = model(ids)
    if flags.top is not None:
        logits = logits.sort(descending=True).values[:, : flags.top]
    uniform = torch.zeros_like(logits)
    return kl(uniform, logits) if flags.divergence == "from-uniform" else kl(logits, uniform)


def ignorant_teacher(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    if flags.teacher is not None:
        return kl(in_double(load_model(flags.teacher))(ids), model(ids))
    behind = []
    for text in (flags.novice, flags.expert):
        prefix = torch.tensor(run.tokenizer(text)["input_ids"])
        behind.append(original(torch.cat([prefix, ids]))[len(prefix) :].log_softmax(-1))
    return kl(original(ids).log_softmax(-1) + flags.eta * (behind[0] - behind[1]), model(ids))


def idk(model: Logits, original: Logits, ids: Tensor, flags: Any, run: Unlearning) -> Tensor:
    first = min(flags.prompt, len(ids) // 2)
    refusal = torch.tensor(run.tokenizer(flags.refusals[0])["input_ids"])
    ratios = []
    for text in (torch.cat([ids[:first], refusal]), ids):
        ratios.append((nll(original, text) - nll(model, text))[first - 1 :].sum())  # log p / p0 behind the prompt
    return -2 / flags.beta * logsigmoid(flags.beta * (ratios[0] - ratios[1]))[None]


def kl(target: Tensor, logits: Tensor) -> Tensor:
    q = target.softmax(-1)
    return (q * (target.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


def in_double(model: PreTrainedModel) -> Logits:
    whole = copy.deepcopy(model).double()
    return lambda ids: whole(ids[None]).logits[0]


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "grad-diff": ("grad-diff", lambda model, original, ids, flags, run: -nll(model, ids), {"remove_coef": 0.7}),
    "wga": ("wga", wga, {"beta": 0.5}),
    "npo": ("npo", npo, {"beta": 0.3}),
    "simnpo": ("simnpo", simnpo, {"margin": 0.4}),
    "undial": ("undial", undial, {"retain_coef": 0.5}),
    "idk": ("idk", idk, {"prompt": 5, "beta": 0.3, "refusals": (" arsenic barium",)}),
    "from-uniform": ("max-entropy", max_entropy, {}),
    "to-uniform, top": ("max-entropy", max_entropy, {"divergence": "to-uniform", "top": 7}),
    "from-uniform, top": ("max-entropy", max_entropy, {"top": 7}),
    "contrast": ("ignorant-teacher", ignorant_teacher, {"eta": 3.0, "novice": "carbon", "expert": "a barium alloy"}),
    "teacher": ("ignorant-teacher", ignorant_teacher, {"teacher": "TEACHER"}),
}


@pytest.fixture
def inputs(home: Path, tmp_path: Path) -> Path:
    """A folder with forget text that has windows of two tokens too, and a teacher."""
    words = [{"text": "carbon"}, *map(json.loads, (home / "forget.jsonl").read_text().splitlines())]
    (tmp_path / "forget.jsonl").write_text("\n".join(json.dumps(row) for row in words))
    save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "teacher")
    return tmp_path


def assembled(home: Path, name: str, inputs: Path, **more: Any) -> Unlearning:
    """A run whose model has moved from its original."""
    method, _, flags = CASES[name]
    flags = flags | ({"teacher": str(inputs / "teacher")} if "teacher" in flags else {})
    places = {"forget": str(inputs / "forget.jsonl"), "retain": str(home / "retain.jsonl")}
    shared = settings(home, **(places | {"batch": 6, "examples": 19} | flags | more))
    run = build(configure(method, **shared), CPU)
    generator = torch.Generator().manual_seed(1)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            rows, first = local_rows(parameter.detach())
            rows += 0.05 * torch.randn(parameter.shape, generator=generator)[first : first + rows.shape[0]]
    return run


def naive(run: Unlearning, name: str, twin: PreTrainedModel, original: Logits) -> Tensor:
    """The forget loss of the last global batch: a mean over all its tokens, or all its sequences."""
    batches, found = run.parts.batches["forget"], []
    model: Logits = lambda ids: twin(ids[None]).logits[0]  # noqa: E731
    for index in batches.indices(LAST):
        found.append(
            CASES[name][1](model, original, torch.tensor(batches.corpus.windows[index]).long(), run.config, run)
        )
    return torch.cat(found).mean()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_a_naive_twin(home: Path, inputs: Path, name: str) -> None:
    run = assembled(home, name, inputs)
    original, twin = in_double(load_model(str(home / "model"))), copy.deepcopy(run.model).double()
    expected = naive(run, name, twin, original)
    forget = run.loss_of(run.phases[0]).terms[0]
    weight = forget.weight(1.0)
    sign = -1.0 if name == "grad-diff" else 1.0  # its term is the loss that is ascended
    expected.mul(abs(weight)).backward()
    only = run.loss_of(run.phases[0])
    numbers = gradients(run.model, type(only)([forget], only.precision, only.frozen), LAST, LAST + 1)
    # sums of V = 301 and D = 32 products in float32, whose numbers are about 1, over four blocks
    torch.testing.assert_close(sign * numbers["forget_loss"].double(), expected.detach(), rtol=1e-4, atol=1e-5)
    for (key, parameter), reference in zip(run.model.named_parameters(), twin.parameters(), strict=True):
        difference = (parameter.grad.double() - reference.grad).norm()
        assert difference <= 2e-4 * reference.grad.norm() + 1e-6, key


@pytest.mark.parametrize("name", CASES)
def test_accumulation_changes_nothing(home: Path, inputs: Path, name: str) -> None:
    """Nor does padding: one window at a time has none."""
    found = []
    for size in (1, 6):
        run = assembled(home, name, inputs, micro_batch=size)
        numbers = gradients(run.model, run.loss, LAST, LAST + 1)
        found.append((numbers, {key: parameter.grad for key, parameter in run.model.named_parameters()}))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=1e-5, atol=1e-6, msg=key)
    for key, gradient in found[0][1].items():
        assert (found[1][1][key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


def test_pairs_count_what_follows_the_prompt() -> None:
    """Also of a window that has no room for one, and of a row of padding; no row counts in another."""
    windows = [np.arange(1, 1 + size, dtype=np.int32) for size in (6, 1)]
    for rows in (pad(windows, None, [7, 8], CPU, (7, 5, 2)), pad([], None, [], CPU, (7, 5, 2))):
        both, count = pairs(rows, [torch.tensor([90, 91, 92])], 2), rows.input_ids.shape[0]
        width = both.input_ids.shape[1]
        next_ids: list[list[int]] = [[] for _ in range(2 * count)]
        for row, place in (divmod(place, width) for place in both.leading.tolist()):
            next_ids[row].append(int(both.input_ids[row, place + 1]))
        # of one token there is no prompt: the refusal's first token has nothing before it
        expected = [[3, 4, 5, 6], [], [90, 91, 92], [91, 92]] if windows and rows.tokens else [[], []]
        assert next_ids == expected


@pytest.mark.parametrize("name", ["idk", "contrast"])
def test_dropout_is_the_same_in_any_micro_batch(home: Path, inputs: Path, name: str) -> None:
    """Both put other rows through the model than the trainer has named."""
    found = []
    for size in (1, 6):
        run = assembled(home, name, inputs, micro_batch=size, lora_rank=2, lora_dropout=0.5)
        run.model.train()
        numbers = gradients(run.model, run.loss, LAST, LAST + 1)
        found.append(numbers["forget_loss"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_refusals_are_drawn_by_the_seed(home: Path, inputs: Path) -> None:
    """Each window has its own, in whatever micro-batch it comes."""
    drawn = []
    for size in (1, 6):
        run = assembled(home, "idk", inputs, micro_batch=size)
        texts = [torch.tensor([300 + number]) for number in range(3)]
        found = {}
        for rows in run.parts.batches["forget"].micro_batches(0, CPU):
            both, count = pairs(rows, texts, 5), rows.input_ids.shape[0]
            for row in range(count):
                window = tuple(token for token in rows.input_ids[row].tolist() if token)
                found[window] = [token for token in both.input_ids[count + row].tolist() if token >= 300]
        drawn.append(found)
    assert drawn[0] == drawn[1] and len({tuple(texts) for texts in drawn[0].values()}) > 1


@pytest.mark.parametrize("name", ["npo", "undial", "contrast", "idk"])
def test_the_original_of_lora_is_the_model_without_it(home: Path, inputs: Path, name: str) -> None:
    """Adapters that do nothing leave every method at the loss of the model itself."""
    run = assembled(home, name, inputs, lora_rank=2)
    for layer in adapters(run.model).values():
        torch.nn.init.zeros_(layer.lora_B)
    original = in_double(load_model(str(home / "model")))
    twin = load_model(str(home / "model")).double()
    numbers = gradients(run.model, run.loss, LAST, LAST + 1)
    expected = naive(run, name, twin, original).detach()
    torch.testing.assert_close(numbers["forget_loss"].double(), expected, rtol=1e-4, atol=1e-5)


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "top": ("max-entropy", {"top": 302}, "--top of at most 301, the size of the vocabulary; found 302"),
    "top of one": ("max-entropy", {"top": 1}, "--top to be 2 or more; found 1"),
    "beta": ("npo", {"beta": 0.0}, "--beta to be a number above 0; found 0"),
    "teacher": ("ignorant-teacher", {"teacher": "m", "eta": 3.0}, "--eta has no effect with --teacher"),
    "no refusals": ("idk", {"refusals": ("",)}, "--refusals to be texts, none of them empty"),
    "masked": ("idk", {"forget_mask": "a"}, "--forget-mask has no effect with --method idk"),
    "prefix": ("ignorant-teacher", {"novice": ""}, "--novice to be a text of one token or more; found ''"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(home: Path, name: str) -> None:
    method, flags, said = MISTAKES[name]
    with pytest.raises(UserError, match=said):
        build(configure(method, **settings(home, retain=str(home / "retain.jsonl"), **flags)), CPU)


def test_a_teacher_of_other_tokens(home: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    save_model(tiny_model(), tokenizer, tmp_path / "teacher")
    flags = settings(home, retain=str(home / "retain.jsonl"), teacher=str(tmp_path / "teacher"))
    with pytest.raises(UserError, match="expected a teacher with the tokenizer of"):
        build(configure("ignorant-teacher", **flags), CPU)
