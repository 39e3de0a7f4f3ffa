"""Filters of the forget gradient, against dense twins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_phases import settings, weights
from torch import Tensor

from unlearn.assemble import Unlearning, build
from unlearn.blank import needs_of
from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.filters import Collapse, Normalise, SignMask, collapse
from unlearn.memory import Layout, Shape, terms
from unlearn.methods.terms import Hooks
from unlearn.model import empty_model
from unlearn.trainer import gradients

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")


def assembled(home: Path, **flags: Any) -> Unlearning:
    return build(configure("grad-diff", **settings(home, retain=str(home / "retain.jsonl"), **flags)), CPU)


def words(home: Path, output: Path, *more: object) -> list[object]:
    flags = settings(home, retain=str(home / "retain.jsonl"), output=output)
    named = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["--method", "grad-diff", *named, *more]


def with_gradients(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_gradient_gets_its_norm() -> None:
    model = tiny_model()
    before = with_gradients(model, 0)
    norm = torch.cat([gradient.flatten() for gradient in before.values()]).double().norm()
    trained = dict(model.named_parameters())
    Normalise(0.1)("retain", trained)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in trained.items())
    Normalise(0.1)("forget", trained)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, before[name] * (0.1 / norm).float(), msg=name)
    for parameter in trained.values():
        parameter.grad.zero_()
    Normalise(0.1)("forget", trained)
    assert not any(parameter.grad.any() for parameter in trained.values()), "nothing is scaled up to NaN"


def test_a_mask_by_the_running_mean() -> None:
    model = tiny_model()
    trained, mask = dict(model.named_parameters()), SignMask(model, 0.75)
    means: dict[str, Tensor] = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for step in range(3):
        for name, gradient in with_gradients(model, 2 * step).items():
            means[name] = 0.75 * means[name] + 0.25 * gradient
        mask("retain", trained)
        before = with_gradients(model, 2 * step + 1)
        mask("forget", trained)
        for name, parameter in trained.items():
            kept = torch.sign(means[name]) == torch.sign(before[name])
            assert 0 < kept.sum() < kept.numel() or kept.numel() < 40
            assert torch.equal(parameter.grad, torch.where(kept, before[name], 0.0)), name


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 7), (16, 16)])
@pytest.mark.parametrize("hard", [False, True])
def test_collapse_against_a_full_decomposition(shape: tuple[int, int], hard: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, mean = (torch.randn(shape, generator=generator) for _ in range(2))
    left, values, right = torch.linalg.svd(mean.double(), full_matrices=False)
    count = min(3, min(shape) // 2)
    expected = gradient.double()
    if count:
        share = torch.ones(count).double() if hard else 1.0 - values[count - 1] / values[:count]
        expected = expected - expected @ right[:count].T @ torch.diag(share) @ right[:count]
        expected = expected - left[:, :count] @ torch.diag(share) @ left[:, :count].T @ expected
    found = collapse(gradient, mean, rank=3, hard=hard)
    # the Gram matrix squares the singular values, which lie within a factor of a few: float32 in, float64 between
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    if hard and count:
        assert (found.double() @ right[0]).norm() <= 1e-4 * (gradient.double() @ right[0]).norm()


def test_collapse_leaves_what_is_rounding() -> None:
    """A mean of rank 1 has one direction; of a mean of 0 there is none."""
    generator = torch.Generator().manual_seed(0)
    gradient, one, other = (torch.randn(size, generator=generator) for size in ((30, 20), (30, 1), (1, 20)))
    assert torch.equal(collapse(gradient, torch.zeros(30, 20), rank=5, hard=True), gradient)
    unit = (other / other.norm()).double()
    found = collapse(gradient, one @ other, rank=5, hard=True)
    left = (one / one.norm()).double()
    expected = gradient.double() - gradient.double() @ unit.T @ unit
    expected = expected - left @ (left.T @ expected)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_collapse_works_on_the_matrices_of_the_blocks() -> None:
    model = tiny_model()
    trained, mean = dict(model.named_parameters()), dict[str, Tensor]()
    one = Collapse(model, 0.5, 4, False)
    for step in range(2):
        before = with_gradients(model, step)
        one("retain", trained)
        one("forget", trained)
        for name, parameter in trained.items():
            if "layers" not in name or parameter.ndim != 2:
                assert torch.equal(parameter.grad, before[name]), name
                continue
            mean[name] = mean.get(name, torch.zeros_like(before[name])).lerp(before[name], 0.5)
            expected = collapse(before[name], mean[name], rank=4, hard=False)
            assert torch.equal(parameter.grad, expected) and not torch.equal(expected, before[name]), name
    assert one.state().keys() == mean.keys()


def test_a_step_of_training_with_filters(home: Path) -> None:
    """Retain first, whatever the method's order; the filters in theirs; the sum of both is what is trained with."""
    run = assembled(home, filter=("sign-mask", "normalise"), filter_norm=0.3)
    loss, hooks, seen = run.loss_of(run.phases[0]), run.hooks_of(run.phases[0]), dict[str, Any]()
    assert [term.name for term in loss.terms] == ["retain", "forget"]

    def watched(term: str, trained: Any) -> None:
        assert hooks.filter is not None
        raw = {name: parameter.grad.clone() for name, parameter in trained.items()}
        hooks.filter(term, trained)
        seen[term] = raw, {name: parameter.grad.clone() for name, parameter in trained.items()}

    gradients(run.model, loss, 0, 5, watched)
    kept, whole = 0, 0
    for name, parameter in run.model.named_parameters():
        retain, (raw, forget) = seen["retain"][0][name], (seen["forget"][0][name], seen["forget"][1][name])
        agree = torch.sign(retain) == torch.sign(raw)  # the mean's first step has the sign of the gradient
        assert torch.equal(forget != 0.0, agree & (raw != 0.0)), name
        assert torch.equal(parameter.grad, retain + forget), name
        kept, whole = kept + int(agree.sum()), whole + agree.numel()
    norm = torch.cat([gradient.flatten() for gradient in seen["forget"][1].values()]).norm()
    assert norm.item() == pytest.approx(0.3, rel=1e-5) and 0 < kept < whole


@pytest.mark.parametrize("names", [("sign-mask",), ("collapse", "normalise")])
def test_what_filters_keep_is_found_again(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    killed_after: Callable[..., None],
    names: tuple[str, ...],
) -> None:
    more = ("--filter", *names, *(("--filter-rank", 3) if "collapse" in names else ()))
    killed_after(2, *words(home, tmp_path / "run", *more))
    for name in ("run", "whole"):
        attempt(*words(home, tmp_path / name, *more))
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "run/config.json").read_text())["filter"] == list(names)


def test_the_plan_counts_what_filters_keep(home: Path) -> None:
    shape, found = Shape.of(empty_model(str(home / "model")), configure("grad-diff", model="m")), {}
    for names in ((), ("sign-mask",), ("collapse",)):
        config = configure("grad-diff", **settings(home, retain=str(home / "retain.jsonl"), filter=names, shard="full"))
        found[names] = terms(config, shape, Layout(2, 2), needs_of(config))
    assert found["sign-mask",]["the retain gradient's mean"] == 4 * shape.parameters / 2
    assert found["collapse",]["the forget gradient's mean"] == 4 * shape.matrices / 2
    assert found["sign-mask",]["gradients"] == 2 * found[()]["gradients"], "each term's is held apart"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": ({"filter": ("collapse",), "lora_rank": 2}, "expected full training for --filter collapse"),
    "no retain loss": ({"filter": ("sign-mask",), "retain_coef": 0.0}, "expected a retain loss for --filter sign-mask"),
    "rank alone": ({"filter_rank": 3}, "--filter-rank has no effect without --filter collapse"),
    "norm of 0": ({"filter": ("normalise",), "filter_norm": 0.0}, "--filter-norm to be a number above 0"),
    "twice": ({"filter": ("normalise", "normalise")}, "expected every name after --filter once"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(home: Path, name: str) -> None:
    flags, said = MISTAKES[name]
    given = settings(
        home, **({} if flags.get("retain_coef") == 0.0 else {"retain": str(home / "retain.jsonl")}), **flags
    )
    with pytest.raises(UserError, match=said):
        configure("grad-diff", **given)


def test_hooks_one_after_the_other() -> None:
    calls: list[Any] = []

    def hooks(name: str, why: str | None) -> Hooks:
        return Hooks(
            filter=lambda term, trained: calls.append((name, term)),
            after_step=lambda done: calls.append((name, done)),
            stop=lambda done, numbers: why,
            state=lambda: {name: torch.zeros(1)},
        )

    both = hooks("one", None).then(hooks("other", "enough"))
    assert both.filter is not None and both.after_step is not None and both.stop is not None
    both.filter("forget", {})
    both.after_step(3)
    assert calls == [("one", "forget"), ("other", "forget"), ("one", 3), ("other", 3)]
    assert both.stop(1, {}) == "enough" and both.state().keys() == {"one", "other"}
    none = Hooks().then(Hooks())
    assert none.filter is none.after_step is none.stop is None
