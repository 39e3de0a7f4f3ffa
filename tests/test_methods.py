"""The methods against a naive twin: one row at a time, whole logits, float64 sums, joint graph."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEPTH
from torch import Tensor

from unlearn.assemble import Unlearning, build
from unlearn.config import TrainConfig, configure, parse_method_flags
from unlearn.distributed import process_group
from unlearn.errors import UserError
from unlearn.lens import TunedLens
from unlearn.lora import adapters, lora_disabled
from unlearn.methods import METHODS, flags_of, method_module
from unlearn.methods.retain import prediction
from unlearn.methods.terms import Loss, Parts, Term
from unlearn.model import load_model
from unlearn.seeding import generator
from unlearn.trainer import gradients

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


def other(home: Path, method: str, **flags: Any) -> Unlearning:
    """A run of another method than the lens, its weights moved away from the original."""
    paths = {"model": str(home / "model"), "forget": str(home / "forget.jsonl")}
    if method != "next-token" and flags.get("retain_coef") != 0.0:
        paths["retain"] = str(home / "retain.jsonl")
    sizes = {"seq_len": 24, "batch": 6, "examples": 20, "micro_batch": 4, "dtype": "fp32"}
    run = build(configure(method, **paths, **sizes, **flags), CPU)
    for index, parameter in enumerate(p for p in run.model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return run


def pairs(run: Unlearning, corpus: str, step: int, layers: tuple[int, ...]) -> list[Tensor]:
    """Of each target layer, both models' streams at every token of a global batch: [2, tokens, D], float64."""
    batches, found = run.parts.batches[corpus], []
    for index in batches.indices(step):
        ids = torch.tensor(batches.corpus.windows[index])[None].long()
        with torch.no_grad(), run.parts.original() as original:
            kept = _states(original, ids)
        live = _states(run.model, ids)
        found.append([torch.stack([live[layer][0], kept[layer][0]]).double() for layer in layers])
    return [torch.cat(rows, dim=1) for rows in zip(*found, strict=True)]


def naive_rmu(run: Unlearning, step: int) -> Tensor:
    u = torch.rand(run.model.config.hidden_size, generator=generator(0, "rmu"))
    goal = (3.0 * u / u.norm()).double()
    forget = [(both[0] - goal).square().mean(-1).mean() for both in pairs(run, "forget", step, (2, 3))]
    retain = [(both[0] - both[1]).square().mean(-1).mean() for both in pairs(run, "retain", step, (2, 3))]
    return torch.stack(forget).mean() + 7.0 * torch.stack(retain).mean()


def naive_circuit_breakers(run: Unlearning, step: int) -> Tensor:
    s = step / (run.steps - 1)
    forget = [torch.cosine_similarity(*both, dim=-1).relu().mean() for both in pairs(run, "forget", step, (1, 3))]
    retain = [(both[0] - both[1]).norm(dim=-1).mean() for both in pairs(run, "retain", step, (1, 3))]
    return 10.0 * (1 - s / 2) * torch.stack(forget).mean() + 5.0 * s * torch.stack(retain).mean()


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 3, "lora_dropout": 0.0}], ids=["full", "lora"])
@pytest.mark.parametrize("step", [1, 3])  # the last global batch is short
@pytest.mark.parametrize(
    ("method", "flags", "naive_loss"),
    [
        ("rmu", {"layers": (2, 3), "steering": 3.0, "retain_coef": 7.0}, naive_rmu),
        ("circuit-breakers", {"layers": (1, 3)}, naive_circuit_breakers),
    ],
)
def test_other_methods_equal_their_naive_twins(
    home: Path, method: str, flags: dict[str, Any], naive_loss: Any, step: int, lora: dict[str, Any]
) -> None:
    run = other(home, method, **flags, **lora)
    assert run.steps == 4 and set(run.parts.batches) == {"forget", "retain"}
    run.model.train()
    found = gradients_of(run, step)["loss"]
    ours = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()
    expected = naive_loss(run, step)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    norm = max(p.grad.norm() for p in run.model.parameters() if p.grad is not None)
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            assert (ours[name] - parameter.grad).norm() <= 2e-5 * norm, name


def test_a_method_reads_what_it_asks_for_alone(home: Path) -> None:
    """No lens, no retain text, no second model, where nobody asks for them."""
    run = other(home, "next-token")
    assert set(run.parts.batches) == {"forget"} and run.original is None
    assert "forget corpus" in run.identity and not {"lens", "retain corpus"} & run.identity.keys()
    assert other(home, "rmu", layers=(2,), retain_coef=0.0).original is None
    assert other(home, "rmu", layers=(2,), retain_loss="kl").original is not None


def test_flags_of_one_method_are_refused_with_another(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--method rmu --remove-coef 3", "--steering 2", "--method=next-token --layers 2", "--method none"):
        with pytest.raises(SystemExit):
            parse_method_flags(TrainConfig, line.split())
    with pytest.raises(UserError, match="--retain has no effect with --data forget"):
        configure("next-token", retain="x.jsonl")
    with pytest.raises(UserError, match="--offload-reference has no effect with a method that has no retain loss"):
        configure("next-token", offload_reference=True, shard="full")
    with pytest.raises(UserError, match="--layers to be one or more different layers"):
        configure("rmu", layers=())
    with pytest.raises(UserError, match="--layers in 0..4"):
        configure("circuit-breakers", layers=(5,)).check_depth(4)
    rmu = parse_method_flags(TrainConfig, ["--method", "rmu", "--optimizer", "muon"])
    assert (rmu.method, rmu.layers, rmu.retain_coef, rmu.adam_lr) == ("rmu", (7,), 1200.0, 5e-5)
    assert rmu.output == "runs/deep-ignorance-unfiltered-rmu-full-muon"
    assert parse_method_flags(TrainConfig, ["--optimizer", "muon"]).method == "lens"


@pytest.mark.parametrize("method", METHODS)
def test_flags_read_without_their_method_are_its_own(method: str) -> None:
    """`flags_of` reads the class from the file alone: the same fields as the method's module has."""
    read, imported = flags_of(method), method_module(method).Flags
    assert [field.name for field in dataclasses.fields(read)] == [field.name for field in dataclasses.fields(imported)]
    assert read.__doc__ == imported.__doc__
