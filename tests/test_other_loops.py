"""Methods that begin with other weights: distill, distort, reset."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from test_phases import settings, weights
from torch import Tensor
from transformers import PreTrainedModel

import train
from unlearn.assemble import Unlearning, build
from unlearn.config import configure
from unlearn.corpus import Corpus
from unlearn.errors import UserError
from unlearn.methods.distill import mix_noise, xavier
from unlearn.methods.distort import distort
from unlearn.methods.reset import tokens_alone
from unlearn.model import load_model, save_model
from unlearn.trainer import gradients

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")
METHODS = ("distill", "distort", "reset")


def flags_of(home: Path, method: str, **flags: Any) -> dict[str, Any]:
    """With the corpora that the method reads."""
    found = settings(home, retain=str(home / "retain.jsonl"), **flags)
    return {name: value for name, value in found.items() if (name, method) != ("forget", "distort")}


def assembled(home: Path, method: str, **flags: Any) -> Unlearning:
    return build(configure(method, **flags_of(home, method, **flags)), CPU)


def words(home: Path, output: Path, method: str, *more: object) -> list[object]:
    flags = flags_of(home, method, output=output)
    named = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["--method", method, *named, *more]


def test_noise_is_xaviers() -> None:
    """The bound of torch's own, its variance, another draw for every name and seed; experts have one axis more."""
    shape = (200, 300)
    theirs = torch.nn.init.xavier_uniform_(torch.empty(shape))
    ours = xavier(shape, 0, "a")
    bound = math.sqrt(6 / 500)
    assert ours.abs().max() <= bound and theirs.abs().max() <= bound
    # the standard deviation of n uniform numbers' mean square is its mean times sqrt(4/5n); five of those
    assert ours.square().mean().item() == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / ours.numel()))
    assert not torch.equal(ours, xavier(shape, 0, "b")) and not torch.equal(ours, xavier(shape, 1, "a"))
    assert xavier((2, 30, 40), 0, "experts").abs().max() <= math.sqrt(6 / 70)


def test_noise_takes_the_place_of_a_share(any_model: PreTrainedModel) -> None:
    before = {name: parameter.detach().clone() for name, parameter in any_model.named_parameters()}
    frozen = next(iter(before))
    any_model.get_parameter(frozen).requires_grad_(False)
    mix_noise(any_model, 0.25, 0.5, seed=3)
    for name, parameter in any_model.named_parameters():
        expected = before[name] if name == frozen else 0.75 * before[name]
        if parameter.ndim == 2 and name != frozen:
            expected = expected + 0.125 * xavier(tuple(parameter.shape), 3, name)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_distortion_is_normal_noise(any_model: PreTrainedModel) -> None:
    before = torch.cat([parameter.detach().flatten().clone() for parameter in any_model.parameters()])
    distort(any_model, 0.02, seed=0)
    moved = torch.cat([parameter.detach().flatten() for parameter in any_model.parameters()]) - before
    count = moved.numel()
    assert moved.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * count))
    assert abs(moved.mean().item()) <= 5 * 0.02 / math.sqrt(count)


@pytest.mark.parametrize("other_teacher", [False, True])
def test_distillation_against_a_naive_twin(home: Path, tmp_path: Path, other_teacher: bool) -> None:
    """Loss and gradients in float64, row by row, whole logits; the teacher is the model before, or another."""
    flags: dict[str, Any] = {"retain_coef": 0.5}
    if other_teacher:
        save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "teacher")
        flags["teacher"] = str(tmp_path / "teacher")
    run = assembled(home, "distill", **flags)
    teacher = load_model(flags.get("teacher", str(home / "model"))).double()
    run.phases[0].begin(run.model)
    twin = copy.deepcopy(run.model).double()
    numbers = gradients(run.model, run.loss, 4, 5)  # the last batch
    losses = {name: naive(run, name, teacher, twin) for name in ("retain", "forget")}
    (0.5 * losses["retain"] + losses["forget"]).backward()
    for name, loss in losses.items():
        # a sum of V = 301 products in float32, of logits whose size is about 1
        torch.testing.assert_close(numbers[f"{name}_loss"].double(), loss.detach(), rtol=1e-4, atol=1e-6)
    for (name, parameter), reference in zip(run.model.named_parameters(), twin.parameters(), strict=True):
        difference = (parameter.grad.double() - reference.grad).norm()
        assert difference <= 1e-4 * reference.grad.norm() + 1e-7, name


def naive(run: Unlearning, corpus: str, teacher: PreTrainedModel, model: PreTrainedModel) -> Tensor:
    """KL(teacher || model) a token of the last global batch."""
    batches, found = run.parts.batches[corpus], []
    for index in batches.indices(4):
        ids = torch.tensor(batches.corpus.windows[index])[None].long()
        with torch.no_grad():
            expected = teacher(ids).logits[0].log_softmax(-1)
        found.append((expected.exp() * (expected - model(ids).logits[0].log_softmax(-1))).sum(-1))
    return torch.cat(found).mean()


def test_distillation_without_noise_is_at_rest(home: Path) -> None:
    """A teacher that is the model itself gives no gradient, to the bit."""
    run = assembled(home, "distill", noise=0.0)
    run.phases[0].begin(run.model)
    gradients(run.model, run.loss, 0, 5)
    assert all(not parameter.grad.any() for parameter in run.model.parameters())


def test_on_retain_text_alone(home: Path) -> None:
    flags = settings(home, retain=str(home / "retain.jsonl"), on_forget=False)
    del flags["forget"]
    run = build(configure("distill", **flags), CPU)
    assert [term.name for term in run.phases[0].terms] == ["retain"] and set(run.parts.batches) == {"retain"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_before_its_first_step(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    run_here: Callable[..., int],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights that it began with are mixed once."""
    attempt(*words(home, tmp_path / "whole", method))

    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "unlearn.evals.training.finish" if method == "reset" else "unlearn.evals.training.train", interrupted
        )
        assert run_here(train.main, *words(home, tmp_path / "run", method)) == 130
    attempt(*words(home, tmp_path / "run", method))
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_reset_changes_the_rows_of_tokens_that_stand_alone(
    home: Path, tmp_path: Path, attempt: Callable[..., str]
) -> None:
    attempt(*words(home, tmp_path / "run", "reset"))
    run = assembled(home, "reset")
    assert run.steps == 0 and run.phases[0].steps == 0
    windows = {
        name: set(np.concatenate(batches.corpus.windows).tolist()) for name, batches in run.parts.batches.items()
    }
    alone = sorted(windows["forget"] - windows["retain"])
    before, after = (load_model(str(folder / "model")).state_dict() for folder in (home, tmp_path / "run"))
    name = "gpt_neox.embed_in.weight"
    assert 0 < len(alone) < before[name].shape[0]
    for other in before.keys() - {name}:
        assert torch.equal(before[other], after[other]), other
    changed = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == alone
    fresh = run.parts.fresh(name)
    assert torch.equal(after[name][alone], fresh[alone])


def test_no_token_that_stands_alone() -> None:
    corpora = [Corpus(name, 1, [np.array([1, 2, 3], dtype=np.int32)]) for name in ("one", "other")]
    with pytest.raises(UserError, match="expected tokens that occur in one and not in other; found none"):
        tokens_alone(*corpora)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_refused(home: Path, method: str) -> None:
    with pytest.raises(UserError, match=f"--lora-rank has no effect with --method {method}"):
        assembled(home, method, lora_rank=2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"noise": 1.5}, "--noise to be a number in \\[0, 1\\]; found 1.5"),
        ({"noise_scale": -1.0}, "--noise-scale to be a finite number, 0 or more"),
        ({"on_forget": False}, "--forget has no effect with --no-on-forget"),
        ({"teacher": "/nowhere"}, "found nothing at /nowhere"),
    ],
)
def test_mistakes_of_distillation(home: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        assembled(home, "distill", **flags)


def test_distortion_reads_no_forget_text(home: Path) -> None:
    with pytest.raises(UserError, match="--forget has no effect with --method distort"):
        configure("distort", **settings(home, retain=str(home / "retain.jsonl")))
