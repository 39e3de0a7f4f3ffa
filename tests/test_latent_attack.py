"""Latent adversarial training: against a naive twin, window by window, in float64, with torch's own Adam."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_output_methods import CPU, LAST, nll, npo
from test_phases import settings
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.assemble import Unlearning, build
from unlearn.blank import needs_of
from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.methods.terms import Loss
from unlearn.model import blocks, load_model
from unlearn.seeding import generator
from unlearn.trainer import gradients

pytestmark = pytest.mark.usefixtures("token_cache")
LAYERS = (0, 2)
ATTACK: dict[str, Any] = {"latent_attack": 3, "latent_layers": LAYERS, "latent_lr": 0.1, "latent_radius": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "npo": {"method": "npo", "beta": 0.3},
    "rmu": {"method": "rmu", "layers": (2,), "steering": 3.0},
}


def both(home: Path) -> dict[str, Any]:
    return {"retain": str(home / "retain.jsonl"), "batch": 6, "examples": 19}


def attacked_run(home: Path, name: str, **more: Any) -> Unlearning:
    """A run whose model has moved from its original, with forget batches of which the last is short."""
    run = build(configure(**settings(home, **(both(home) | METHODS[name] | ATTACK | more))), CPU)
    noise = torch.Generator().manual_seed(1)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    return run


class Perturbed:
    """The twin with a perturbation [S, D] at each layer, and the stream that enters the layer after the last."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.added = model, dict[int, Tensor]()
        self.streams: dict[int, Tensor] = {}
        for layer, block in enumerate(blocks(model)):
            block.register_forward_pre_hook(self.hook(layer), with_kwargs=True)

    def hook(self, layer: int) -> Any:
        def enter(_module: Any, args: Any, kwargs: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            if layer in self.added:
                stream = stream + self.added[layer]
            self.streams[layer] = stream[0]
            return ((stream, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": stream})

        return enter

    def __call__(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(ids[None]).logits[0]
        return found

    def attack(self, ids: Tensor) -> float:
        """Find perturbations of one window."""
        width = self.model.config.hidden_size
        self.added = {layer: torch.zeros(len(ids), width, dtype=torch.float64).requires_grad_() for layer in LAYERS}
        adam = torch.optim.Adam(self.added.values(), lr=ATTACK["latent_lr"])
        for _ in range(ATTACK["latent_attack"]):
            adam.zero_grad()
            losses = nll(self, ids)
            losses.sum().backward(inputs=list(self.added.values()))
            adam.step()
            for d in self.added.values():
                d.data *= (ATTACK["latent_radius"] / d.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        self.added = {layer: d.detach() for layer, d in self.added.items()}
        return losses.sum().item()


def forget_loss(run: Unlearning, twin: Perturbed, ids: Tensor) -> Tensor:
    if run.config.method == "npo":
        original = load_model(run.config.model).double()
        return npo(twin, lambda window: original(window[None]).logits[0], ids, run.config, run)
    twin(ids)
    u = torch.rand(run.model.config.hidden_size, generator=generator(run.config.seed, "rmu"))
    goal = (run.config.steering * u / u.norm()).double()  # type: ignore[attr-defined]
    return (twin.streams[2] - goal).square().mean(dim=-1)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_of_a_naive_twin(home: Path, name: str) -> None:
    run = attacked_run(home, name)
    twin, batches = Perturbed(copy.deepcopy(run.model).double()), run.parts.batches["forget"]
    losses, likelihoods = [], []
    for index in batches.indices(LAST):
        ids = torch.tensor(batches.corpus.windows[index]).long()
        likelihoods.append((twin.attack(ids), len(ids) - 1))
        losses.append(forget_loss(run, twin, ids))
        assert all(d.norm(dim=-1)[:-1].min() > 0.1 for d in twin.added.values())  # the attack does something
    whole = run.loss_of(run.phases[0])
    forget = next(term for term in whole.terms if term.name == "forget")
    torch.cat(losses).mean().mul(forget.weight(1.0)).backward()
    numbers = gradients(run.model, Loss([forget], whole.precision, whole.frozen), LAST, LAST + 1)
    # Adam makes rounding large where a gradient is nothing: a few of some thousand elements of d
    torch.testing.assert_close(numbers["forget_loss"].double(), torch.cat(losses).mean().detach(), rtol=1e-3, atol=1e-5)
    expected = sum(total for total, _ in likelihoods) / sum(count for _, count in likelihoods)
    assert numbers["latent_nll"].item() == pytest.approx(expected, rel=1e-3)
    for (key, parameter), reference in zip(run.model.named_parameters(), twin.model.parameters(), strict=True):
        if reference.grad is None:  # above the layer that the loss reads
            assert parameter.grad is None or not parameter.grad.any(), key
        else:
            assert (parameter.grad.double() - reference.grad).norm() <= 2e-3 * reference.grad.norm() + 1e-6, key


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_and_recomputed_blocks_change_nothing(home: Path, name: str) -> None:
    """Nor does padding: one window at a time has none."""
    found = []
    for size, again in ((1, "full"), (2, "selective"), (6, "none")):
        run = attacked_run(home, name, micro_batch=size, checkpoint_activations=again)
        numbers = gradients(run.model, run.loss, LAST, LAST + 1)
        found.append((numbers, {key: p.grad for key, p in run.model.named_parameters() if p.grad is not None}))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=1e-3, atol=1e-5, msg=key)
    for key, gradient in found[0][1].items():
        assert (found[1][1][key] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-6, key


def test_the_original_of_lora_is_not_attacked(home: Path) -> None:
    """Its adapters do nothing yet: without an attack the loss is that of equal models, and the retain loss is 0."""
    run = build(
        configure(**settings(home, **(both(home) | METHODS["npo"] | ATTACK | {"lora_rank": 2, "retain_loss": "kl"}))),
        CPU,
    )
    numbers = gradients(run.model, run.loss, 0, 1)
    equal = 2 / 0.3 * torch.log(torch.tensor(2.0))  # -2/b log sigmoid(0)
    assert numbers["retain_loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert numbers["forget_loss"].item() != pytest.approx(equal.item(), rel=1e-2)


def test_what_an_attack_costs(home: Path) -> None:
    """Three steps are three passes more, forward and backward, of the forget text."""
    costs = []
    for more in ({}, ATTACK):
        config = configure(**settings(home, **(METHODS["npo"] | {"retain_coef": 0.0} | more)))
        needs = needs_of(config)
        costs.append((needs[0].forward, needs[0].backward))
    assert costs[1] == (costs[0][0] + 3, costs[0][1] + 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"method": "npo", "latent_radius": 1.0}, "--latent-radius has no effect without --latent-attack"),
        ({"method": "idk", "latent_attack": 2}, "no --latent-attack with --method idk"),
        ({"method": "next-token", "latent_attack": 2}, "no effect with --method next-token"),
        ({"method": "npo", "latent_attack": 2, "latent_layers": (4,)}, r"--latent-layers in 0\.\.3"),
        ({"method": "rmu", "layers": (2,), "latent_attack": 2, "latent_layers": (0, 3)}, "--latent-layers up to 2"),
    ],
)
def test_refusals(home: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(configure(**settings(home, **(flags if flags["method"] == "next-token" else both(home) | flags))), CPU)
