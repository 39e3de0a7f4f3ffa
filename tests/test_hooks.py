"""What a method does within a step beside its loss: a filter of gradients, a stop rule, and what they keep."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_phases import method, settings, weights, words
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.assemble import build
from unlearn.config import TrainConfig, configure
from unlearn.errors import NotFinite
from unlearn.methods.retain import prediction
from unlearn.methods.terms import Hooks, Loss, Parts, Phase, Term
from unlearn.trainer import check_gradients, gradients

__all__ = ["method"]  # a fixture
pytestmark = pytest.mark.usefixtures("token_cache")


class Agreement:
    """Lets a forget gradient pass where its sign is that of the retain gradients' running mean."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.means = model, dict[str, Tensor]()

    def state(self) -> dict[str, Tensor]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in self.means:
                self.means[name] = torch.zeros_like(parameter.detach())
        return self.means

    @torch.no_grad()
    def __call__(self, term: str, trained: Mapping[str, nn.Parameter]) -> None:
        for name, mean in self.state().items():
            gradient = trained[name].grad
            assert gradient is not None
            if term == "retain":
                mean.mul_(0.5).add_(gradient, alpha=0.5)
            else:
                gradient.mul_((mean.sign() == gradient.sign()).to(gradient.dtype))


def both_terms(parts: Parts) -> list[Term]:
    """The next tokens of retain text held, those of forget text made unlikely."""
    cost = prediction(parts.model)
    retain, forget = (Term(name, parts.batches[name], cost) for name in ("retain", "forget"))
    return [retain, Term("forget", forget.batches, cost, weight=lambda s: -0.5)]


def masked(flags: TrainConfig, parts: Parts) -> list[Phase]:
    """Five steps in which the mask keeps its means."""
    agreement = Agreement(parts.model)
    return [Phase("", both_terms(parts), hooks=Hooks(filter=agreement, state=agreement.state))]


def stopped(flags: TrainConfig, parts: Parts) -> list[Phase]:
    """Of four steps and one, the first phase stops after two."""

    def stop(done: int, numbers: Mapping[str, float]) -> str | None:
        assert numbers["retain_loss"] > 1.0  # nats, of all ranks together: a share alone would be half
        return "the second step is enough" if done == 2 else None

    terms = both_terms(parts)
    return [Phase("first", terms, steps=4, hooks=Hooks(stop=stop)), Phase("second", terms, steps=1)]


def with_retain(home: Path, output: Path, *more: object) -> list[object]:
    return words(home, output, "--data", "mix", "--retain", home / "retain.jsonl", *more)


def test_a_filter_sees_each_term_alone(home: Path, method: Any) -> None:
    """And what it leaves is added to the other terms'."""
    method(phases=masked)
    flags = settings(home, data="mix", retain=str(home / "retain.jsonl"))
    run = build(configure("next-token", **flags), torch.device("cpu"))
    trained, seen = dict(run.model.named_parameters()), dict[str, dict[str, Tensor]]()

    def halve_forget(term: str, given: Mapping[str, nn.Parameter]) -> None:
        assert given.keys() == trained.keys()
        seen[term] = {name: parameter.grad.clone() for name, parameter in given.items()}
        if term == "forget":
            for parameter in given.values():
                parameter.grad.mul_(0.5)

    gradients(run.model, run.loss, 0, 5, halve_forget)
    joint = {name: parameter.grad.clone() for name, parameter in trained.items()}
    for term in run.loss.terms:
        run.model.zero_grad()
        gradients(run.model, Loss([term]), 0, 5)
        for name, parameter in trained.items():
            assert torch.equal(seen[term.name][name], parameter.grad), (term.name, name)
    for name, gradient in joint.items():
        assert torch.equal(gradient, 0.5 * seen["forget"][name] + seen["retain"][name]), name


def test_a_filter_never_sees_what_is_not_finite(
    home: Path, attempt: Callable[..., str], tmp_path: Path, method: Any
) -> None:
    """A mask would turn NaN into 0, and keep it in its means."""

    def phases(flags: TrainConfig, parts: Parts) -> list[Phase]:
        def refuse(term: str, trained: Mapping[str, nn.Parameter]) -> None:
            raise AssertionError("called")

        begin = lambda model: next(model.parameters()).data.fill_(float("nan"))  # noqa: E731
        return [Phase("", both_terms(parts), begin=begin, hooks=Hooks(filter=refuse))]

    method(phases=phases)
    said = attempt(*with_retain(home, tmp_path / "run"))
    assert "expected finite losses and gradients; found NaN or infinity at step 0" in said


@pytest.mark.parametrize("killed", [1, 3])
def test_what_a_filter_keeps_is_found_again(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    killed_after: Callable[..., None],
    method: Any,
    killed: int,
) -> None:
    method(phases=masked)
    killed_after(killed, *with_retain(home, tmp_path / "run"))
    for name in ("run", "whole"):
        attempt(*with_retain(home, tmp_path / name))
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("killed", [None, 1, 4])
def test_a_stop_rule_ends_its_phase(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    killed_after: Callable[..., None],
    method: Any,
    killed: int | None,
) -> None:
    """The next phase follows as if the first had been run to its end; the log says why, also of a run that goes on."""
    method(phases=stopped)
    if killed is not None:
        killed_after(killed, *with_retain(home, tmp_path / "run"))
    attempt(*with_retain(home, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"], line.get("stopped")) for line in lines] == [
        (0, "first", None),
        (1, "first", "the second step is enough"),
        (4, "second", None),
    ]
    assert weights(tmp_path / "run").keys()


def test_the_finite_check_of_a_gradient_alone() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    assert check_gradients([parameter], {}, 0).item() == 5.0
    parameter.grad[1] = float("inf")
    with pytest.raises(NotFinite):
        check_gradients([parameter], {}, 0)
