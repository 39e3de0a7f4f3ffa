"""Which parameters train: --train, --lora-layers; and SGD."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_phases import settings, words

from unlearn.assemble import build
from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.lora import adapters, add_lora, load_adapter, save_adapter
from unlearn.memory import Shape, flops_per_token
from unlearn.methods.terms import Needs
from unlearn.model import load_model
from unlearn.optim.build import build_optimizers
from unlearn.parameters import lowest_block, matching
from unlearn.trainer import gradients

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("pattern", "optimizer"),
    [(r"layers\.[12]\.mlp", "muon"), ("embed_in", "adamw"), ("final_layer_norm", "sgd")],
)
def test_only_what_the_pattern_names_is_trained(
    home: Path, tmp_path: Path, attempt: Callable[..., str], pattern: str, optimizer: str
) -> None:
    attempt(*words(home, tmp_path / "run", "--train", pattern, "--optimizer", optimizer, *learning_rate(optimizer)))
    before, after = (load_model(str(folder / "model")).state_dict() for folder in (home, tmp_path / "run"))
    named = set(matching(load_model(str(home / "model")), pattern))
    assert 0 < len(named) < len(before)
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == (name not in named), name


def learning_rate(optimizer: str) -> list[object]:
    """In place of the --adam-lr that the test's flags have."""
    return ["--adam-lr", "None", "--sgd-lr", 0.5] if optimizer == "sgd" else []


def test_a_part_gets_the_gradient_that_it_has_in_the_whole(home: Path) -> None:
    found = {}
    for pattern in (None, r"layers\.2"):
        run = build(configure("next-token", **settings(home, train=pattern)), CPU)
        gradients(run.model, run.loss, 0, 5)
        found[pattern] = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
    assert 0 < len(found[r"layers\.2"]) < len(found[None])
    for name, gradient in found[r"layers\.2"].items():
        assert torch.equal(gradient, found[None][name]), name


def test_sgd_moves_against_the_gradient() -> None:
    """By the learning rate times it, and decoupled weight decay of matrices; it keeps nothing."""
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    built = build_optimizers(model, optimizer="sgd", adam_lr=None, sgd_lr=0.5, weight_decay=0.1)
    assert list(built) == ["sgd"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built["sgd"].step()
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * (1.0 + decay * before[name]), msg=name)
    assert not any(len(state) for state in built["sgd"].state.values())


def test_lora_in_some_layers(tmp_path: Path) -> None:
    """As PEFT has it."""
    peft = pytest.importorskip("peft")
    model, targets = tiny_model(), ["query_key_value", "dense"]
    add_lora(model, 3, 5.0, 0.0, targets, layers=[1, 3])
    assert {name.split(".")[2] for name in adapters(model)} == {"1", "3"}
    for layer in adapters(model).values():
        layer.lora_B.data.normal_()
    save_adapter(model, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, expected)
        loaded = tiny_model()
        load_adapter(loaded, tmp_path)
        torch.testing.assert_close(loaded.eval()(ids).logits, expected)


def test_one_layer_written_as_a_number(tmp_path: Path) -> None:
    """PEFT takes layers_to_transform of 0 for [0]; 0 is false, and was every layer."""
    model = tiny_model()
    add_lora(model, 3, 5.0, 0.0, layers=[0])
    save_adapter(model, tmp_path, "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_to_transform": 0}))
    loaded = tiny_model()
    load_adapter(loaded, tmp_path)
    assert adapters(loaded).keys() == adapters(model).keys()


def test_the_lowest_block() -> None:
    model = tiny_model()
    for pattern, expected in {"embed_in": -1, "": -1, r"layers\.[23]": 2, "final_layer_norm": 4}.items():
        assert lowest_block(model, matching(model, pattern)) == expected


def test_flops_of_a_part() -> None:
    """Backward ends at the lowest block that trains; its weights alone have gradients."""
    model, needs = tiny_model(), Needs()
    plain = {"model": "m", "checkpoint_activations": "none"}
    shapes = {p: Shape.of(model, configure("next-token", **plain, train=p)) for p in (None, r"layers\.3\.mlp")}
    whole, part = (flops_per_token(configure("next-token", **plain), shape, needs) for shape in shapes.values())
    shape = shapes[r"layers\.3\.mlp"]
    mlp = 2 * 32 * 48
    assert shape.matrices == 4 * (4 * 32**2 + mlp) and shape.trained_matrices == mlp and shape.lowest == 3
    assert whole == 6 * shape.matrices + 6 * shape.head
    assert part == 2 * shape.matrices + 2 * shape.matrices / 4 + 2 * mlp + 4 * shape.head


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no match": ({"train": "q_proj"}, "--train to be found in the name of a parameter, such as gpt_neox.embed_in"),
    "no expression": ({"train": "layers.("}, "--train to be a regular expression; found 'layers.\\('"),
    "with LoRA": ({"train": "mlp", "lora_rank": 2}, "--train has no effect with LoRA"),
    "no such block": ({"lora_rank": 2, "lora_layers": (1, 4)}, "--lora-layers in 0..3 .*; found 4"),
    "without LoRA": ({"lora_layers": (1,)}, "--lora-layers has no effect without --lora-rank"),
    "rates": ({"optimizer": "sgd"}, "--adam-lr has no effect with --optimizer sgd"),
    "sgd alone": ({"sgd_lr": 0.1}, "--sgd-lr has no effect without --optimizer sgd"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(home: Path, name: str) -> None:
    flags, said = MISTAKES[name]
    with pytest.raises(UserError, match=said):
        build(configure("next-token", **settings(home, **flags)), CPU)


@pytest.mark.parametrize(
    "flags", [{"train": r"layers\.[23]"}, {"train": "final_layer_norm"}, {"lora_rank": 2, "lora_layers": (2, 3)}]
)
def test_nothing_that_the_loss_reads(home: Path, flags: dict[str, Any]) -> None:
    """RMU at layer 2 reads what blocks 0 and 1 wrote: it would train nothing, for hours."""
    named = settings(home, retain=str(home / "retain.jsonl"), layers=(1, 2), **flags)
    with pytest.raises(
        UserError, match="expected to train something below layer 2, .* the lowest is (in block 2|above all blocks)"
    ):
        build(configure("rmu", **named), CPU)
    build(configure("rmu", **(named | {"layers": (2, 4)} | ({"train": r"layers\.3"} if "train" in flags else {}))), CPU)
