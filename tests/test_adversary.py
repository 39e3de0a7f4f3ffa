"""The relearning adversary: against a naive twin, window by window, in float64, over several steps."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_filters import words
from test_latent_attack import ATTACK, METHODS, Perturbed, both, forget_loss
from test_output_methods import CPU, nll
from test_phases import settings
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.assemble import Unlearning, build
from unlearn.blank import needs_of
from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.methods.terms import Loss
from unlearn.model import blocks
from unlearn.seeding import generator
from unlearn.trainer import gradients

pytestmark = pytest.mark.usefixtures("token_cache")
ADVERSARY: dict[str, Any] = {"adversary": "relearn", "adversary_rank": 3, "adversary_lr": 0.5, "adversary_restart": 3}
STEPS, RATE = 4, 0.05


def run_beside(home: Path, name: str, **more: Any) -> Unlearning:
    """A run whose model has moved from its original, with forget batches of which the last is short."""
    run = build(configure(**settings(home, **(both(home) | METHODS[name] | ADVERSARY | more))), CPU)
    noise = torch.Generator().manual_seed(1)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    return run


class Relearning(Perturbed):
    """The twin with W + B A in place of every W inside the blocks."""

    def __init__(self, model: PreTrainedModel, prefix: str, seed: int):
        super().__init__(model)
        self.prefix, self.seed = prefix, seed
        self.linears = {prefix + n: m for n, m in blocks(model).named_modules() if isinstance(m, nn.Linear)}
        for name, linear in self.linears.items():
            linear.register_forward_hook(
                lambda _, x, y, name=name: y + x[0] @ self.pairs[name][0].T @ self.pairs[name][1].T
            )
        self.begin()

    def begin(self) -> None:
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, linear in self.linears.items():
            noise = torch.rand(3, linear.in_features, generator=generator(self.seed, "adversary", name)).double()
            up = torch.zeros(linear.out_features, 3, dtype=torch.float64)
            self.pairs[name] = ((2 * noise - 1) / linear.in_features**0.5).requires_grad_(), up.requires_grad_()

    def relearn(self, found: list[Tensor], done: int) -> None:
        """One step of SGD by gradients that were taken before; anew after three."""
        for tensor, gradient in zip([t for pair in self.pairs.values() for t in pair], found, strict=True):
            tensor.data -= ADVERSARY["adversary_lr"] * gradient
        if done % ADVERSARY["adversary_restart"] == 0:
            self.begin()


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_of_a_naive_twin(home: Path, name: str) -> None:
    """Over four steps, in which the adversary learns three times, and begins anew once; the model moves too."""
    run = run_beside(home, name)
    twin = Relearning(copy.deepcopy(run.model).double(), "gpt_neox.layers.", run.config.seed)
    batches, whole, hooks = run.parts.batches["forget"], run.loss_of(run.phases[0]), run.hooks_of(run.phases[0])
    forget = next(term for term in whole.terms if term.name == "forget")
    assert hooks.after_step is not None
    moved = []
    for step in range(STEPS):
        windows = [torch.tensor(batches.corpus.windows[index]).long() for index in batches.indices(step)]
        likelihood = torch.cat([nll(twin, ids) for ids in windows]).mean()
        taught = torch.autograd.grad(likelihood, [tensor for pair in twin.pairs.values() for tensor in pair])
        twin.model.zero_grad()
        expected = torch.cat([forget_loss(run, twin, ids) for ids in windows]).mean()
        weight = forget.weight(step / (STEPS - 1))
        (weight * expected).backward()
        run.model.zero_grad()
        numbers = gradients(run.model, Loss([forget], whole.precision, whole.frozen), step, STEPS)
        assert numbers["adversary_nll"].item() == pytest.approx(likelihood.item(), rel=1e-5)
        assert numbers["forget_loss"].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        moved.append(max(up.detach().abs().max().item() for _, up in twin.pairs.values()))
        for (key, parameter), reference in zip(run.model.named_parameters(), twin.model.parameters(), strict=True):
            if reference.grad is None:  # above the layer that the loss reads
                assert parameter.grad is None or not parameter.grad.any(), key
                continue
            assert (parameter.grad.double() - reference.grad).norm() <= 1e-4 * reference.grad.norm() + 1e-6, (step, key)
            parameter.data -= RATE * parameter.grad
            reference.data -= RATE * reference.grad
        hooks.after_step(step + 1)
        twin.relearn(list(taught), step + 1)
    assert moved[0] == moved[3] == 0.0 and min(moved[1:3]) > 1e-2, moved


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_and_recomputed_blocks_change_nothing(home: Path, name: str) -> None:
    found = []
    for size, again in ((1, "full"), (2, "selective"), (6, "none")):
        run = run_beside(home, name, micro_batch=size, checkpoint_activations=again)
        hooks = run.hooks_of(run.phases[0])
        for step in range(3):
            numbers = gradients(run.model, run.loss, step, 3)
            taken = {key: p.grad.clone() for key, p in run.model.named_parameters() if p.grad is not None}
            run.model.zero_grad()
            assert hooks.after_step is not None
            hooks.after_step(step + 1)
        found.append((numbers, taken))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=1e-4, atol=1e-5, msg=key)
    for key, gradient in found[0][1].items():
        assert (found[1][1][key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


def learnt(run: Unlearning) -> Unlearning:
    """With an adversary that differs from none."""
    for name, value in run.state().items():
        if name.endswith(".B"):
            value.copy_(torch.randn(value.shape, generator=generator(0, name)))
    return run


def test_only_the_forget_loss_meets_it(home: Path) -> None:
    """The original has no adversary, though it is the model itself; nor have the retain loss and what is exported."""
    flags: dict[str, Any] = {"lora_rank": 2, "lora_dropout": 0.0, "retain_loss": "kl"}
    run = learnt(build(configure(**settings(home, **(both(home) | METHODS["npo"] | ADVERSARY | flags))), CPU))
    plain = build(configure(**settings(home, **(both(home) | METHODS["npo"] | flags))), CPU)
    numbers, others = (gradients(one.model, one.loss, 0, 1) for one in (run, plain))
    assert numbers["retain_loss"].item() == others["retain_loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert abs(numbers["forget_loss"].item() - others["forget_loss"].item()) > 1e-2
    assert run.model.state_dict().keys() == plain.model.state_dict().keys()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(run.model.eval()(ids).logits, plain.model.eval()(ids).logits)


def test_it_stands_beside_a_latent_attack(home: Path) -> None:
    """The attack perturbs what the adversary has changed: one loss more is harder than either alone."""
    alone = learnt(run_beside(home, "npo"))
    together = learnt(run_beside(home, "npo", **ATTACK))
    numbers = [gradients(run.model, run.loss, 0, 1) for run in (alone, together)]
    assert numbers[1]["latent_nll"] < numbers[1]["adversary_nll"] == numbers[0]["adversary_nll"]


def test_a_run_goes_on_with_the_adversary_that_it_had(
    home: Path, tmp_path: Path, attempt: Callable[..., str], killed_after: Callable[..., None]
) -> None:
    """To the bit, after a kill between two new beginnings."""
    more = ["--examples", 8, "--batch", 4, "--epochs", 4, "--adversary", "relearn", "--adversary-rank", 2]
    more += ["--adversary-restart", 3, "--save-every", 1]
    attempt(*words(home, tmp_path / "whole", *more))
    killed_after(5, *words(home, tmp_path / "run", *more))
    attempt(*words(home, tmp_path / "run", *more))
    found, whole = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[key], value) for key, value in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["adversary_nll"] > 0.0]) == 8


def test_what_it_costs(home: Path) -> None:
    """A pass more, forward and backward, of the forget text."""
    costs = []
    for more in ({}, ADVERSARY):
        needs = needs_of(configure(**settings(home, **(METHODS["npo"] | {"retain_coef": 0.0} | more))))
        costs.append((needs[0].forward, needs[0].backward, needs[0].bytes))
    assert costs[1][:2] == (costs[0][0] + 1, costs[0][1] + 1) and costs[1][2] > costs[0][2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"method": "npo", "adversary_lr": 1.0}, "--adversary-lr has no effect without --adversary relearn"),
        ({"method": "next-token", "adversary": "relearn"}, "--adversary has no effect with --method next-token"),
        ({"method": "npo", "adversary": "relearn", "compile_blocks": True}, "no --compile-blocks beside --adversary"),
        ({"method": "npo", "adversary": "relearn", "adversary_rank": 0}, "--adversary-rank to be"),
    ],
)
def test_refusals(home: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configure(**settings(home, **(flags if flags["method"] == "next-token" else both(home) | flags)))
