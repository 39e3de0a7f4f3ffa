"""Optimizers against torch's own, roles, and schedules."""

import copy
import math

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr as torch_adjust_lr
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from unlearn.errors import UserError
from unlearn.lora import add_lora
from unlearn.optim.build import (
    assignment,
    build_optimizers,
    linear_schedule,
    make_schedule,
    roles,
    set_learning_rates,
)
from unlearn.optim.layout import assign, balance
from unlearn.optim.muon import Muon
from unlearn.optim.newton_schulz import flops
from unlearn.optim.polar import polar_factor, wire_dtype

# odd, one row, one column, small (batched: short side up to 128, several of a shape) and large
SHAPES = [(16, 16), (48, 16), (16, 48), (5, 7), (1, 9), (16, 48), (140, 192), (131, 300), (300, 131)]


def named(parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]


def torch_step(
    weight: Tensor, gradient: Tensor, momentum: Tensor, nesterov: bool, lr: float, beta: float, decay: float, scale: str
) -> None:
    """One step of torch.optim.Muon, by its own functions; but in bfloat16 without Nesterov it would divide the momentum
    by its norm in place, and add a transposed update to a tall weight, rounding twice."""
    momentum.lerp_(gradient, 1 - beta)
    direction = gradient.lerp(momentum, beta) if nesterov else momentum.clone()
    update = torch_newton_schulz(direction, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    weight.mul_(1 - lr * decay)
    weight.add_(update.contiguous(), alpha=-torch_adjust_lr(lr, scale, weight.shape))


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_to_the_bit(nesterov: bool, adjust_lr: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    mine = Muon(named(ours), adjust_lr=adjust_lr, method="quintic", **settings)
    reference = torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, **settings)
    for step in range(5):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            scale = (1.0, 1e-12, 0.0)[index % 3] if step == 2 else 1.0
            a.grad = scale * torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_to_the_bit_in_bfloat16(nesterov: bool) -> None:
    """But for what torch rounds twice: the elements after the last whole vector of 64, all of a tall matrix, whose
    update it leaves transposed, and everything on a processor without vectors."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        weight = nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
        twin, momentum = weight.detach().clone(), torch.zeros(shape, dtype=torch.bfloat16)
        mine = Muon([("w", weight)], lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1, method="quintic")
        vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # where there are none, torch rounds twice
        whole = weight.numel() // 64 * 64 if vectors else 0
        for _ in range(5):
            weight.grad = torch.randn(shape, generator=generator).bfloat16()
            torch_step(twin, weight.grad, momentum, nesterov, 0.02, 0.9, 0.1, "match_rms_adamw")
            mine.step()
            assert torch.equal(weight.detach().flatten()[:whole], twin.flatten()[:whole]), shape
            assert torch.equal(mine.state[weight]["momentum_buffer"], momentum)
            torch.testing.assert_close(weight.detach(), twin, rtol=2**-7, atol=2**-9)
            twin.copy_(weight.detach())  # the few others may not grow apart


def test_torchs_state_continues_in_muon() -> None:
    """The names in the state are torch.optim.Muon's."""
    generator = torch.Generator().manual_seed(0)
    theirs = nn.Parameter(torch.randn(6, 9, generator=generator))
    reference = torch.optim.Muon([theirs], lr=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        theirs.grad = torch.randn(6, 9, generator=generator)
        reference.step()
    ours = nn.Parameter(theirs.detach().clone())
    mine = Muon([("w", ours)], lr=0.1, weight_decay=0.1, method="quintic")
    mine.load_state_dict(
        {"state": copy.deepcopy(reference.state_dict()["state"]), "param_groups": mine.state_dict()["param_groups"]}
    )
    ours.grad = theirs.grad
    mine.step()
    reference.step()
    assert torch.equal(ours, theirs)


def test_muon_leaves_parameters_without_gradient() -> None:
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    parameters[0].grad = torch.ones(3, 4)
    mine = Muon(named(parameters), lr=0.1)
    assert all("momentum_buffer" in mine.state[parameter] for parameter in parameters)
    mine.step()
    assert torch.equal(parameters[1], torch.ones(3, 4)) and not torch.equal(parameters[0], parameters[1])
    assert mine.step(lambda: torch.tensor(3.0)) == 3.0
    Muon(named(parameters[1:]), lr=0.1).step()  # no gradient at all
    groups = [{"params": named(parameters[:1]), "method": "quintic"}, {"params": [("p", parameters[1])]}]
    assert [group["floor"] for group in Muon(groups, lr=0.1).param_groups] == [0.0, 0.01]


def test_what_muon_refuses() -> None:
    wide = nn.Parameter(torch.ones(24, 4))
    refused = [
        ([("w", nn.Parameter(torch.ones(4)))], {}, r"found w of shape \(4,\)"),
        ([wide], {}, "found parameters alone"),
        ([{"params": [("w", wide)]}, {"params": [("w", nn.Parameter(torch.ones(2, 2)))]}], {}, "found one twice"),
        ([("w", wide)], {"qkv": "split", "heads": 2}, r"named \*query_key_value.weight .*found none"),
        ([("query_key_value.weight", wide)], {"qkv": "per-head", "heads": 3}, "divide the 24 rows .*found heads=3"),
        ([("query_key_value.weight", wide)], {"qkv": "split"}, "found heads=None"),
        ([("w", wide)], {"floor": 0.2}, "expected a floor"),
        ([("w", wide)], {"floor": 0.1, "method": "quintic"}, "0 with quintic"),
    ]
    for parameters, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            Muon(parameters, lr=0.1, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    mine = Muon(named(parameters), lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.full((3, 4), 1e38)  # finite, though their sum is not
    mine.step()
    before = [parameter.detach().clone() for parameter in parameters]
    state = copy.deepcopy(mine.state_dict()["state"])
    parameters[1].grad[2, 3] = value
    with pytest.raises(UserError, match="in that of p1, before any weight"):
        mine.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert all(
        torch.equal(mine.state_dict()["state"][i]["momentum_buffer"], state[i]["momentum_buffer"]) for i in (0, 1)
    )


@pytest.mark.parametrize(
    ("method", "floor", "size"), [("quintic", 0.0, 5), ("gram", 0.0, 5), ("gram", 0.01, 5), ("gram", 0.01, 70)]
)
def test_qkv_apart_equals_by_hand(method: str, floor: float, size: int) -> None:
    """GPT-NeoX keeps, head by head, the rows of its q, its k and its v."""
    heads, width = 2, 17 if size == 5 else 90
    gradient = torch.randn(heads * 3 * size, width, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(heads * 3 * size)
    whose = {
        "split": rows // size % 3,  # 0: q, 1: k, 2: v
        "per-head": rows // size,
        "fused": torch.zeros_like(rows),
    }
    for qkv, pieces in whose.items():
        weight = nn.Parameter(torch.zeros_like(gradient))
        weight.grad = gradient.clone()
        pair = ("layers.0.attention.query_key_value.weight", weight)
        settings = {"method": method, "floor": floor, "qkv": qkv, "heads": heads}
        Muon([pair], lr=1.0, momentum=0.0, weight_decay=0.0, **settings).step()
        for piece in pieces.unique():
            part = gradient[pieces == piece]
            direction = part.to(wire_dtype(*part.shape, floor))
            by_hand = -0.2 * math.sqrt(max(part.shape)) * polar_factor(direction, method, floor=floor).float()
            # batches may round otherwise than single matrices, and then in the last bit of what is sent
            bound = 2**-8 if floor > 0.0 and size == 70 else 1e-5
            assert (weight.detach()[pieces == piece] - by_hand).norm() <= bound * by_hand.norm()


def test_a_gradient_of_rounding_moves_nothing() -> None:
    """The retain loss of the first step is 0, and its gradient 1e-7 of rounding: every matrix above the target layers
    got a full-size update of noise."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 90), (100, 130)):  # exact, and iterated
        real, noise = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        both = [("real", real), ("noise", noise)]
        floored, plain = Muon(both, lr=1.0), Muon(both, lr=1.0, floor=0.0)
        for optimizer, still in ((floored, True), (plain, False)):
            real.grad = torch.randn(shape, generator=generator)
            noise.grad = 1e-8 * torch.randn(shape, generator=generator)
            optimizer.step()
            assert real.count_nonzero() > 0 and (noise.count_nonzero() == 0) == still
    quiet = nn.Parameter(torch.zeros(40, 90))  # alone, it is no noise however small it is
    quiet.grad = 1e-12 * torch.randn(40, 90, generator=generator)
    Muon([("quiet", quiet)], lr=1.0).step()
    assert quiet.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_owners_by_longest_processing_time() -> None:
    costs = {"a": 3.0, "b": 3.0, "c": 2.0, "d": 2.0, "e": 2.0}
    assert assign(costs, 2) == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0}
    assert assign(dict(reversed(costs.items())), 2) == {"b": 0, "a": 1, "e": 0, "d": 1, "c": 0}
    assert balance(costs, 2) == pytest.approx(6 / 7) and balance({"a": 1.0}, 4) == 0.25
    block = {"qkv": (12288, 4096), "dense": (4096, 4096), "up": (16384, 4096), "down": (4096, 16384)}
    model = {f"{i}.{name}": float(flops(*shape, "quintic")) for i in range(32) for name, shape in block.items()}
    assert [round(balance(model, ranks), 2) for ranks in (4, 8, 16, 24, 32, 64)] == [1.0, 1.0, 1.0, 0.98, 1.0, 0.88]


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


def test_who_got_what() -> None:
    model = tiny_model()
    built = build_optimizers(model, optimizer="muon", adam_lr=1e-3, muon_lr=1e-2, momentum=0.9, qkv="per-head")
    table = assignment(model, built)
    assert (
        "muon     4 x [96, 32]         gpt_neox.layers.*.attention.query_key_value.weight (12,288 parameters)" in table
    )
    assert "adamw    1 x [301, 32]        lm_head.weight (9,632 parameters)" in table
    assert sum(int(line.split()[1]) for line in table) == len(list(model.parameters()))
    assert {(g["qkv"], g["heads"]) for g in built["muon"].param_groups} == {("per-head", 4)}
    with pytest.raises(UserError, match="for --muon-qkv split; found none"):
        build_optimizers(tiny_model("llama"), optimizer="muon", adam_lr=1e-3, muon_lr=1e-2, momentum=0.9, qkv="split")


def test_nothing_eligible_is_an_error() -> None:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(UserError, match="found none"):
        build_optimizers(model, optimizer="adamw", adam_lr=1e-3)
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(UserError, match="for Muon; found none"):
        build_optimizers(model, optimizer="muon", adam_lr=1e-3, muon_lr=1e-3, momentum=0.9)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_schedules_against_those_of_transformers(warmup: float) -> None:
    """Theirs warm up from 0 at step 0, ours reach the peak one step earlier: after the warm-up they are the same."""
    steps, rising = 16, round(16 * warmup)
    theirs = {
        "constant": get_constant_schedule_with_warmup,
        "linear": get_linear_schedule_with_warmup,
        "cosine": get_cosine_schedule_with_warmup,
    }
    for kind, build in theirs.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        total = {} if kind == "constant" else {"num_training_steps": steps}
        scheduler = build(optimizer, num_warmup_steps=rising, **total)
        ours = make_schedule(kind, steps, warmup)
        for step in range(steps):
            found = scheduler.get_last_lr()[0] if step >= rising else (step + 1) / rising
            assert ours(step) == pytest.approx(found, abs=1e-12), (kind, step)
            optimizer.step()
            scheduler.step()


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
