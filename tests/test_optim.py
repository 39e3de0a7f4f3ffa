"""Optimizers against torch's own, roles, and schedules."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from unlearn.errors import UserError
from unlearn.lora import add_lora
from unlearn.optim.build import build_optimizers, linear_schedule, roles, set_learning_rates
from unlearn.optim.muon import Muon
from unlearn.optim.newton_schulz import orthogonalize

SHAPES = [(16, 16), (48, 16), (16, 48), (5, 7), (1, 9)]


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_to_the_bit(nesterov: bool, adjust_lr: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    mine = Muon(ours, adjust_lr=adjust_lr, **settings)
    reference = torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert 0.4 < values.min() and values.max() < 1.35
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))


def test_muon_leaves_parameters_without_gradient_and_refuses_vectors() -> None:
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    parameters[0].grad = torch.ones(3, 4)
    Muon(parameters, lr=0.1).step()
    assert torch.equal(parameters[1], torch.ones(3, 4)) and not torch.equal(parameters[0], parameters[1])
    with pytest.raises(ValueError, match=r"found a parameter of shape \(4,\)"):
        Muon([nn.Parameter(torch.ones(4))], lr=0.1)


def test_roles_of_full_training() -> None:
    """Embeddings are matrices by shape and AdamW's by role."""
    model = tiny_model()
    parts = roles(model)
    assert set(parts.embeddings) == {"gpt_neox.embed_in.weight", "lm_head.weight"}
    assert len(parts.matrices) == 16 and all(".layers." in name for name in parts.matrices)
    assert all(parameter.ndim == 1 for parameter in parts.vectors.values())
    built = build_optimizers(model, optimizer="muon", adam_lr=1e-3, muon_lr=1e-2, momentum=0.9)
    counts = {name: sum(len(g["params"]) for g in optimizer.param_groups) for name, optimizer in built.items()}
    assert counts == {"muon": 16, "adamw": len(list(model.parameters())) - 16}
    decays = {group["weight_decay"]: len(group["params"]) for group in built["adamw"].param_groups}
    assert decays == {0.01: 2, 0.0: len(parts.vectors)}


def test_roles_of_lora() -> None:
    model = tiny_model()
    add_lora(model, 2, 4.0)
    built = build_optimizers(model, optimizer="muon", adam_lr=None, muon_lr=1e-2, momentum=0.9)
    assert set(built) == {"muon"} and len(built["muon"].param_groups[0]["params"]) == 32
    assert set(build_optimizers(model, optimizer="adamw", adam_lr=1e-3)) == {"adamw"}


def test_nothing_eligible_is_an_error() -> None:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(UserError, match="found none"):
        build_optimizers(model, optimizer="adamw", adam_lr=1e-3)
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(UserError, match="for Muon; found none"):
        build_optimizers(model, optimizer="muon", adam_lr=1e-3, muon_lr=1e-3, momentum=0.9)


def test_linear_schedule() -> None:
    assert [linear_schedule(4)(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    warm = linear_schedule(10, warmup_ratio=0.2)
    assert [warm(0), warm(1), warm(2), warm(9)] == pytest.approx([0.5, 1.0, 1.0, 0.125])
    late = linear_schedule(10, decay_ratio=0.4)
    assert [late(0), late(6), late(7), late(9)] == pytest.approx([1.0, 1.0, 0.75, 0.25])
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    for factor, expected in ((0.5, 1.0), (0.25, 0.5)):
        set_learning_rates([optimizer], factor)
        assert optimizer.param_groups[0]["lr"] == expected
