"""The same update at any number of ranks and any accumulation, the last global batch short."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import write_home
from harness import run_ranks
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from unlearn.assemble import Unlearning, build
from unlearn.config import configure
from unlearn.distributed import fail_together, rank, sum_gradients
from unlearn.errors import UserError
from unlearn.export import read_lens
from unlearn.methods.terms import Cost, Loss
from unlearn.optim.build import linear_schedule
from unlearn.run.log import MetricsLog
from unlearn.seeding import generator
from unlearn.trainer import gradients, train
from unlearn.weights import full, local_rows

pytestmark = pytest.mark.usefixtures("token_cache")
MODES = {
    "lora-adamw": {"lora_rank": 3, "lora_dropout": 0.1, "adam_lr": 1e-2},
    "full-muon": {"optimizer": "muon", "muon_lr": 1e-3, "adam_lr": 1e-3},
    "lora-muon": {"lora_rank": 3, "lora_dropout": 0.1, "optimizer": "muon", "muon_lr": 1e-3},
    # no retain gradient at step 0: blocks above layer 2 and the head then have no gradient, on any number of ranks
    "late-retain": {"adam_lr": 1e-3, "weight_decay": 0.1, "retain_start": 0.0, "layers": (1, 2)},
    "rmu-muon": {"method": "rmu", "layers": (2,), "retain_coef": 5.0, "optimizer": "muon", "adam_lr": 1e-3},
    "breakers-lora": {"method": "circuit-breakers", "layers": (1, 3), "lora_rank": 3, "lora_dropout": 0.1},
    "sampled-kl": {"lora_rank": 3, "forget_loss": "sampled", "retain_loss": "kl", "adam_lr": 1e-2},
}


# Two orders of the float32 sums in a gradient differ by some 1e-7 of it. Biases and LoRA's B start at zero: they are
# nothing but updates. An update of LoRA's under Muon is exact, and its floor of 0.01 lets such differences grow a
# hundredfold, 1e-5 a step; those of large matrices are rounded to bfloat16 on their way, 2^-9 an element.
BOUNDS = {"full-muon": 1e-2, "rmu-muon": 1e-2, "lora-muon": 1e-3}


class Lines(MetricsLog):
    """A log that keeps its lines, on every rank."""

    def __init__(self) -> None:
        super().__init__(None, 0, "test")
        self.lines: list[dict[str, Any]] = []

    def write(self, values: Any, shown: tuple[str, ...] = ()) -> None:
        self.lines.append(dict(values))


def prepare(home: Path, mode: str, **flags: Any) -> Unlearning:
    paths = {name: str(home / name) for name in ("model", "lens")}
    paths |= {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    # 19 examples in batches of 8: the last global batch has 3 rows, fewer than 4 ranks
    sizes = {"layers": (1, 3, 4), "seq_len": 24, "batch": 8, "examples": 19, "dtype": "fp32", "retain_start": 0.5}
    if "method" in MODES[mode]:
        del paths["lens"]
    run = build(configure(**(paths | sizes | MODES[mode] | flags)), torch.device("cpu"))
    if mode == "breakers-lora":
        move_away(run.model)
    return run


def move_away(model: nn.Module) -> None:
    """From the original, where the cosine has its greatest value, and its gradient is nothing but rounding."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows, first = local_rows(parameter.detach())
            noise = 0.05 * torch.randn(parameter.shape, generator=generator(0, name))
            rows += noise[first : first + rows.shape[0]]


def few_steps(home: Path, mode: str, flags: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    run, log = prepare(home, mode, **flags), Lines()
    schedule = linear_schedule(run.steps)
    train(run.model, run.loss, run.optimizers, steps=run.steps, schedule=schedule, log=log, clip=1.0)
    return log.lines, {name: full(p.detach()).clone() for name, p in run.model.named_parameters() if p.requires_grad}


def meant(name: str, tensor: Tensor) -> Tensor:
    """Without a key's bias, which attention does not depend on: its gradient is rounding, and so is what Adam makes of
    it."""
    if not name.endswith("query_key_value.bias"):
        return tensor
    return tensor.view(4, 3, -1)[:, [0, 2]]  # [heads, (q, k, v), head size]


VARIANTS = [
    (1, {"micro_batch": 2, "shard": "full"}),
    (1, {"micro_tokens": 70}),
    (2, {"micro_batch": 1, "shard": "replicate"}),
    (2, {"micro_batch": 4, "shard": "full"}),
    (3, {"micro_batch": 2, "shard": "full", "checkpoint_activations": "none"}),
    (4, {"micro_batch": 8, "shard": "replicate"}),
    (4, {"micro_tokens": 30, "shard": "hybrid", "shard_size": 2}),
]


LATER = ("sampled-kl", "lora-adamw")  # whose gradients are compared below, and whose optimizer others share


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow if m in LATER else ()) for m in MODES])
def test_ranks_shards_and_accumulation_change_nothing(home: Path, mode: str) -> None:
    lines, weights = few_steps(home, mode, {"micro_batch": 8})
    assert len(lines) == 3
    for world_size, flags in VARIANTS[::2]:  # the others' gradients are compared below
        results = run_ranks(world_size, few_steps, home, mode, flags)
        for other_lines, other_weights in results:
            for line, other in zip(lines, other_lines, strict=True):
                assert line.keys() == other.keys()
                # step 0 differs by the order of float32 sums alone; later steps also by what the optimizer made of
                # that, and Muon rounds large matrices to bfloat16 (4e-3)
                tolerance = 1e-5 if line["step"] == 0 else 2e-3 if mode in ("full-muon", "rmu-muon") else 2e-4
                for key in line.keys() - {"tokens_per_second", "tflops_per_rank", "peak_gib"}:
                    expected = pytest.approx(line[key], rel=tolerance, abs=1e-6)
                    assert other[key] == expected, (world_size, flags, line["step"], key)
            for name, weight in weights.items():
                # Adam's first steps are +-lr whatever the gradient's size, and Muon rounds to bfloat16: a coordinate
                # whose gradient is rounding noise may go either way, so the bound is on the tensor's norm
                difference = meant(name, other_weights[name] - weight).norm()
                assert difference <= BOUNDS.get(mode, 4e-3) * meant(name, weight).norm(), (world_size, flags, name)
        first = results[0][1]
        for _, other_weights in results[1:]:
            assert all(torch.equal(other_weights[name], weight) for name, weight in first.items()), "ranks differ"


@pytest.mark.parametrize("mode", ["lora-muon", "full-muon"])
def test_twenty_steps_end_together(home: Path, mode: str) -> None:
    """Muon lifted rounding to full size: two runs that differed in the order of float32 sums had parted, 0.15 to 0.62
    of a weight's norm after three steps, by the make of processor."""
    short = {"batch": 4, "examples": 40, "epochs": 2}
    lines, weights = few_steps(home, mode, {"micro_batch": 4} | short)
    assert len(lines) == 20
    for other_lines, other_weights in run_ranks(
        2, few_steps, home, mode, {"micro_batch": 1, "shard": "replicate"} | short
    ):
        assert other_lines[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=BOUNDS[mode])
        for name, weight in weights.items():
            assert meant(name, other_weights[name] - weight).norm() < BOUNDS[mode] * meant(name, weight).norm(), name


def gradients_of(home: Path, mode: str, flags: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Those of a full global batch and of the short one, both of the original weights."""
    run = prepare(home, mode, **flags)
    trained = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    found = []
    for step in (1, 2):
        gradients(run.model, run.loss, step, run.steps)
        found.append({name: full(parameter.grad).clone() for name, parameter in trained.items()})
        for parameter in trained.values():
            parameter.grad = None
    return found


def assert_same_gradients(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for step, other in zip(expected, found, strict=True):
        for name, gradient in step.items():
            # absolutely for those that are nothing but rounding, as a key's bias
            assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("mode", MODES)
def test_ranks_shards_and_accumulation_change_no_gradient(home: Path, mode: str) -> None:
    """But for the order of float32 sums."""
    expected = gradients_of(home, mode, {"micro_batch": 8})
    for world_size, flags in VARIANTS[1::2] + VARIANTS[-1:]:
        for found in run_ranks(world_size, gradients_of, home, mode, flags):
            assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param("gpt2", "sampled-kl", marks=pytest.mark.slow),
        ("gemma2", "full-muon"),
        pytest.param("gpt2", "full-muon", marks=pytest.mark.slow),
        pytest.param("gemma2", "sampled-kl", marks=pytest.mark.slow),
    ],
)
def test_tied_weights(kind: str, mode: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The root of a sharded model holds them: forward passes that ended early left it gathered, and stale."""
    home = write_home(tmp_path, tokenizer, kind)
    late = {"retain_start": 0.0, "retain_loss": "kl"}
    lines, _ = few_steps(home, mode, late | {"micro_batch": 4})
    expected = gradients_of(home, mode, {"micro_batch": 4})
    for world_size, flags in VARIANTS[2:4] + VARIANTS[-1:]:
        for other_lines, _ in run_ranks(world_size, few_steps, home, mode, late | flags):
            for line, other in zip(lines, other_lines, strict=True):
                for key in ("forget_loss", "retain_loss", "gradient_norm"):
                    tolerance = 1e-5 if line["step"] == 0 else 2e-3
                    assert other[key] == pytest.approx(line[key], rel=tolerance, abs=1e-6), (flags, line["step"], key)
        for found in run_ranks(world_size, gradients_of, home, mode, flags):
            assert_same_gradients(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_two_micro_batches_on_one_rank_or_two_are_equal_to_the_bit(home: Path, mode: str) -> None:
    """Full global batches of two micro-batches a term: replicated on one rank; replicated and sharded on two.

    Muon takes adapters in batches where they are whole, and one by one where they are sharded: their factor is computed
    in float64, where the difference is far below float32's rounding.
    """
    flags: dict[str, Any] = {"micro_batch": 4, "examples": 48}
    ((lines, weights),) = run_ranks(1, few_steps, home, mode, flags)
    for shard in ("replicate", "full"):
        for other_lines, other_weights in run_ranks(2, few_steps, home, mode, flags | {"shard": shard}):
            for line, other in zip(lines, other_lines, strict=True):
                assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)  # a sum of float32 shares
            for name, weight in weights.items():
                assert torch.equal(weight, other_weights[name]), (shard, name)


def reductions(home: Path, mode: str, micro_batch: int) -> int:
    """How often an optimizer step all-reduces gradients across the replicas."""
    run = prepare(home, mode, shard="hybrid", shard_size=2, micro_batch=micro_batch)
    across, honest, groups = next(run.model.parameters()).device_mesh.get_group("replicate"), dist.all_reduce, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        groups.append(kwargs.get("group"))
        return honest(*args, **kwargs)

    dist.all_reduce = counted  # in this forked rank alone
    gradients(run.model, run.loss, 1, run.steps)
    return groups.count(across)


@pytest.mark.parametrize("mode", ["full-muon", "late-retain", "sampled-kl"])
def test_replicas_reduce_their_gradients_once_a_step(home: Path, mode: str) -> None:
    """However many micro-batches there are."""
    few, many = (set(run_ranks(4, reductions, home, mode, size)) for size in (2, 1))
    assert few == many and len(few) == 1 and 0 not in few


def gradients_of_one_rank() -> list[Tensor | None]:
    parameters = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2, 5, dtype=torch.float64)),
        nn.Parameter(torch.zeros(7)),
    ]
    parameters[0].grad = torch.full((3,), float(rank() + 1))
    if rank() == 1:
        parameters[1].grad = torch.full((2, 5), 4.0, dtype=torch.float64)
    sum_gradients(parameters, bucket_bytes=8)
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_ranks_gradient_counts(world_size: int) -> None:
    """The predecessor's adapters were never reduced: rank 0 trained alone."""
    for first, second, third in run_ranks(world_size, gradients_of_one_rank):
        assert torch.equal(first, torch.full((3,), world_size * (world_size + 1) / 2))
        if world_size > 1:
            assert torch.equal(second, torch.full((2, 5), 4.0, dtype=torch.float64))
            assert torch.equal(third, torch.zeros(7))


def poisoned_step(home: Path) -> tuple[str, bool]:
    """A gradient that is NaN on the last rank only: every rank must stop, and before any weight moves."""
    run = prepare(home, "lora-adamw", micro_batch=2)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]

    @dataclass(frozen=True)
    class Poisoned:
        honest: Cost

        def backward(self, weight: float) -> Any:
            found = self.honest.backward(weight)
            if rank() == torch.distributed.get_world_size() - 1:
                next(p for p in run.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
            return found

    def cost(term: Any) -> Any:
        return lambda rows: Poisoned(term.cost(rows))

    loss = Loss([dataclasses.replace(term, cost=cost(term)) for term in run.loss.terms], run.loss.precision)
    try:
        train(run.model, loss, run.optimizers, steps=1, schedule=lambda step: 1.0, log=Lines(), clip=1.0)
    except UserError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        return str(error), same
    return "no error", False


@pytest.mark.parametrize("world_size", [1, 2])
def test_nan_on_one_rank_stops_all_before_any_weight_changes(home: Path, world_size: int) -> None:
    for message, same in run_ranks(world_size, poisoned_step, home):
        assert "NaN or infinity at step 0" in message and same


def fails_on_one_rank(kind: str) -> str:
    """A rank that fails inside `fail_together` must not leave the others waiting."""
    try:
        with fail_together():
            if rank() == 1:
                raise UserError("the disk is full") if kind == "user" else KeyError("a bug")
    except UserError as error:
        return str(error)
    except KeyError:
        return "own traceback"
    return "no error"


def test_a_failure_on_one_rank_reaches_all() -> None:
    assert run_ranks(3, fails_on_one_rank, "user") == ["the disk is full"] * 3
    told = "rank 1 failed; its traceback says why"
    assert run_ranks(3, fails_on_one_rank, "bug") == [told, "own traceback", told]


def read_with_too_few(home: Path, examples: int, batch: int) -> str:
    try:
        paths = {name: str(home / name) for name in ("model", "lens")}
        paths |= {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
        build(
            configure(**paths, layers=(1,), examples=examples, batch=batch, seq_len=24, dtype="fp32"),
            torch.device("cpu"),
        )
    except UserError as error:
        return str(error)
    return "no error"


def test_more_ranks_than_examples_or_rows(home: Path) -> None:
    for message in run_ranks(3, read_with_too_few, home, 2, 8):
        assert "at least one example a rank (3 ranks); found 2" in message
    for message in run_ranks(3, read_with_too_few, home, 9, 2):
        assert "--batch of at least one row a rank (3 ranks); found 2" in message


def readings(home: Path, mode: str, flags: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = prepare(home, mode, prompts=("amber basalt", "cobalt dolomite ember"), **flags)
    run.model.train()
    state = torch.get_rng_state()
    read_lens(run, folder, "before")
    assert run.model.training and torch.equal(torch.get_rng_state(), state), "training goes on as if nothing was read"
    dist.barrier()
    return json.loads((folder / "lens.json").read_text())


@pytest.mark.parametrize(("mode", "shards"), [("lora-adamw", ("replicate", "full")), ("full-muon", ("full", "full"))])
def test_prompts_are_read_the_same_on_any_number_of_ranks(
    home: Path, tmp_path: Path, mode: str, shards: tuple[str, ...]
) -> None:
    (one,) = run_ranks(1, readings, home, mode, {}, tmp_path)
    for world_size, shard in zip((2, 3), shards, strict=True):
        for other in run_ranks(world_size, readings, home, mode, {"shard": shard}, tmp_path):
            for prompt, again in zip(one["prompts"], other["prompts"], strict=True):
                assert prompt["tokens"] == again["tokens"]
                for row, row_again in zip(prompt["before"], again["before"], strict=True):
                    assert row["tokens"] == row_again["tokens"]
                    assert row["entropy"] == pytest.approx(row_again["entropy"], rel=1e-5)


def read_and_train(home: Path, folder: Path) -> list[dict[str, Any]]:
    run, log = prepare(home, "full-muon", shard="full", prompts=("basalt garnet",)), Lines()
    read_lens(run, folder, "before")
    train(run.model, run.loss, run.optimizers, steps=1, schedule=linear_schedule(1), log=log)
    return log.lines


def test_prompts_leave_a_sharded_model_with_tied_embeddings_sharded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Reading --prompts left the root's weights gathered, and the first backward pass failed on mixed tensors."""
    home = write_home(tmp_path / "home", tokenizer, "gpt2")
    (tmp_path / "run").mkdir()
    lines = run_ranks(2, read_and_train, home, tmp_path / "run")
    assert lines[0][0]["loss"] == lines[1][0]["loss"]


def test_ranks_of_two_nodes_share_a_copy_each(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --shard; the numbers are those of one rank."""

    def of_two_nodes() -> tuple[Any, ...]:
        run = prepare(home, "full-muon", micro_batch=2)
        return run.config.shard, run.chosen[0], gradients(run.model, run.loss, 1, run.steps)["loss"].item()

    alone = prepare(home, "full-muon", micro_batch=2)
    alone.model.train()
    expected = gradients(alone.model, alone.loss, 1, alone.steps)["loss"].item()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = run_ranks(4, of_two_nodes)
    assert {(shard, line.partition(":")[0]) for shard, line, _ in found} == {("hybrid", "--shard hybrid")}
    assert sum(share for *_, share in found) == pytest.approx(expected, rel=1e-5)
