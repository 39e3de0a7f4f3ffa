"""The methods against a naive twin: one row at a time, whole logits, float64 sums, joint graph."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEPTH
from torch import Tensor

from unlearn.config import TrainConfig, configure
from unlearn.distributed import process_group
from unlearn.lens import TunedLens
from unlearn.lora import adapters, lora_disabled
from unlearn.methods.retain import prediction
from unlearn.methods.terms import Loss, Parts, Term
from unlearn.model import load_model
from unlearn.trainer import gradients
from unlearn.unlearning import Unlearning, build

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")


def config(home: Path, **flags: object) -> TrainConfig:
    paths = {name: str(home / name) for name in ("model", "lens")}
    paths |= {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    shared = {"layers": (1, 3, 4), "seq_len": 24, "batch": 6, "examples": 20, "micro_batch": 4, "dtype": "fp32"}
    return configure(**(paths | shared | {"retain_start": 0.5} | flags))


def gradients_of(run: Unlearning, step: int) -> dict[str, Tensor]:
    """Leave one step's gradient in `.grad`; return the numbers to log."""
    return gradients(run.model, run.loss, step, run.steps)


def naive(parts: Parts, lens: TunedLens, step: int, flags: TrainConfig) -> dict[str, Tensor]:
    """F, R and the weighted loss of one global batch, without chunks or padding."""
    shift = 1 if flags.lens_tap == "output" else 0
    forget, retain = [], []
    for index in parts.batches["forget"].indices(step):
        ids = torch.tensor(parts.batches["forget"].corpus.windows[index])[None].long()
        streams = _states(parts.model, ids)
        per_layer = []
        for layer in flags.layers:
            logits = (lens.hidden(streams[layer + shift][0], layer) @ lens.unembedding.T).double()
            if flags.forget_loss == "uniform":
                losses = -torch.log_softmax(logits, -1).mean(-1)
            else:
                losses = -torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            per_layer.append(losses / math.log(logits.shape[-1]))
        forget.append(torch.stack(per_layer))
    for index in parts.batches["retain"].indices(step):
        ids = torch.tensor(parts.batches["retain"].corpus.windows[index])[None].long()
        with torch.no_grad(), parts.original() as original:
            kept_states, kept = _states(original, ids), torch.log_softmax(original(ids).logits[0].double(), -1)
        if flags.retain_loss == "kl":
            live = torch.log_softmax(parts.model(ids).logits[0].double(), -1)
            retain.append((kept.exp() * (kept - live)).sum(-1)[None])
        else:
            states = _states(parts.model, ids)
            pairs = [(states[layer + shift][0], kept_states[layer + shift][0]) for layer in flags.layers]
            retain.append(torch.stack([(a - b).double().norm(dim=-1) for a, b in pairs]))
    losses = {"forget_loss": torch.cat(forget, 1).mean(), "retain_loss": torch.cat(retain, 1).mean()}
    s = step / 3
    remove = flags.remove_coef * (1.0 - 0.25 * s)
    hold = flags.retain_coef * (flags.retain_start + (1.0 - flags.retain_start) * s)
    return losses | {"loss": remove * losses["forget_loss"] + hold * losses["retain_loss"]}


def _states(model: torch.nn.Module, ids: Tensor) -> list[Tensor]:
    """h[0..L], the last one before the final norm."""
    last = {}
    handle = model.gpt_neox.layers[-1].register_forward_hook(lambda _m, _a, out: last.update(h=out))
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return [*states[:-1], last["h"]]


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_rank": 3, "lora_dropout": 0.0},
        {"lora_rank": 3, "lora_dropout": 0.0, "retain_loss": "kl"},
        {},
        {"retain_loss": "l2", "layers": (0, 2), "lens_tap": "output"},
        {"forget_loss": "gradient-ascent"},
    ],
)
def test_losses_and_gradients_equal_the_naive_twin(home: Path, flags: dict[str, object]) -> None:
    settings = config(home, **flags)
    run = build(settings, CPU)
    assert run.steps == 4
    for index, parameter in enumerate(p for p in run.model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data += 0.05 * noise  # away from the original, where the retain loss is 0
    run.model.train()
    metrics = gradients_of(run, 2)
    ours = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
    run.model.zero_grad()
    lens = TunedLens.load(str(home / "lens"), load_model(str(home / "model")))
    expected = naive(run.parts, lens, 2, settings)
    expected["loss"].backward()
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key].double(), value.detach(), rtol=1e-5, atol=1e-6)
    norm = max(p.grad.norm() for p in run.model.parameters() if p.grad is not None)
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            other = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mine = torch.zeros_like(parameter) if ours[name] is None else ours[name]
            assert (mine - other).norm() <= 2e-5 * norm, name  # float32 sums in another order


def test_sampled_loss_has_the_mean_of_the_uniform_loss(home: Path) -> None:
    run = build(config(home, forget_loss="sampled", micro_batch=6), CPU)
    uniform = gradients_of(build(config(home), CPU), 0)["forget_loss"]
    forget = run.loss.terms[0]
    rows = [r for step in range(4) for r in forget.batches.micro_batches(step, CPU)]
    draws = []
    for salt in range(40):
        for row in rows[:1]:
            salted = dataclasses.replace(row, keys=row.keys + 1000 * salt)
            draws.append(forget.cost(salted).backward(1.0)[0])
    sampled = torch.stack(draws)
    error = sampled.std() / math.sqrt(len(draws))
    assert abs(sampled.mean() - uniform) < 4 * error and sampled.std() > 0


def test_weights_move_per_optimizer_step(home: Path) -> None:
    run = build(config(home, remove_coef=4.0, retain_coef=2.0, retain_start=0.25), CPU)
    assert [run.loss.weights(step, 5) for step in (0, 2, 4)] == [[4.0, 0.5], [3.5, 1.25], [3.0, 2.0]]
    assert run.loss.weights(0, 1) == [4.0, 0.5]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("retain", ["kl", "l2"])
@pytest.mark.parametrize("shard", [None, "full"])
@pytest.mark.parametrize("flags", [{"lora_rank": 2}, {}], ids=["lora", "full"])
def test_retain_loss_is_exactly_zero_at_the_start(
    home: Path, flags: dict[str, Any], shard: str | None, retain: str, dtype: str
) -> None:
    with process_group():
        run = build(config(home, dtype=dtype, retain_loss=retain, shard=shard, **flags), CPU)
        run.model.train()
        assert gradients_of(run, 0)["retain_loss"].item() == 0.0


def test_reference_stays_the_original(home: Path) -> None:
    original = load_model(str(home / "model"))
    ids = torch.tensor([[5, 6, 7, 8]])
    for flags in ({"lora_rank": 2}, {}):
        run = build(config(home, **flags), CPU)
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.data += 1.0
        with run.parts.original() as reference:
            assert torch.equal(reference(ids).logits, original(ids).logits)


def test_one_coefficient_alone_needs_one_corpus(home: Path) -> None:
    settings = config(
        home, retain_coef=0.0, retain_start=0.0, retain="EleutherAI/wikitext_document_level:wikitext-103-raw-v1"
    )
    run = build(settings, CPU)
    assert set(run.parts.batches) == {"forget"} and "retain_loss" not in gradients_of(run, 0)


def test_bf16_losses_are_close(home: Path) -> None:
    for flags in ({"lora_rank": 2}, {}):
        exact = gradients_of(build(config(home, **flags), CPU), 1)
        rounded = build(config(home, dtype="bf16", **flags), CPU)
        assert {p.dtype for p in rounded.model.parameters() if p.requires_grad} == {torch.float32}
        metrics = gradients_of(rounded, 1)
        assert metrics["forget_loss"].dtype == torch.float32
        torch.testing.assert_close(metrics["forget_loss"], exact["forget_loss"], rtol=1e-2, atol=0)


def test_next_token_loss_equals_transformers(home: Path) -> None:
    run = build(config(home, lora_rank=2, lora_dropout=0.0), CPU)
    forget = run.parts.batches["forget"]
    loss = gradients(run.model, Loss([Term("text", forget, prediction(run.model))]), 3, 4)["text_loss"]
    total, count = 0.0, 0
    for index in forget.indices(3):
        ids = torch.tensor(forget.corpus.windows[index])[None].long()
        total += run.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    with lora_disabled(run.model):
        assert all(not layer.enabled for layer in adapters(run.model).values()) and DEPTH == 4
