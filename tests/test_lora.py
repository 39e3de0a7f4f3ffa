"""LoRA against PEFT, and its promises: the original stays, dropout does not depend on padding or place."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.lora import (
    adapters,
    add_lora,
    load_adapter,
    lora_disabled,
    merge_lora,
    save_adapter,
    set_dropout_rows,
)
from unlearn.model import disable_dropout
from unlearn.seeding import keep_mask

INPUT = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])


def adapted(kind: str = "gpt_neox", dropout: float = 0.0, targets: tuple[str, ...] = ()) -> PreTrainedModel:
    """A tiny model whose adapters are no longer zero."""
    model = tiny_model(kind)
    add_lora(model, 4, 8.0, dropout, targets)
    generator = torch.Generator().manual_seed(0)
    for layer in adapters(model).values():
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=INPUT, use_cache=False).logits


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2"])
def test_forward_gradients_and_merged_weights_equal_peft(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(kind)
    save_adapter(ours, tmp_path, "somebody/model")
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), str(tmp_path), is_trainable=True)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    logits(ours).square().mean().backward()
    logits(theirs).square().mean().backward()
    other = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(other) == 2 * len(adapters(ours))
    for name, layer in adapters(ours).items():
        for part in "AB":
            expected = other[f"base_model.model.{name}.lora_{part}.default.weight"].grad
            torch.testing.assert_close(getattr(layer, f"lora_{part}").grad, expected, rtol=1e-4, atol=1e-6)
    merge_lora(ours)
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == ours.state_dict().keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)


def test_adapter_of_peft_loads_here(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query_key_value", "dense"], lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_model(), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    theirs.save_pretrained(tmp_path)
    ours = tiny_model()
    load_adapter(ours, tmp_path)
    assert len(adapters(ours)) == 8
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_disabled_is_the_base_to_the_bit(any_model: PreTrainedModel) -> None:
    expected = logits(any_model)
    disable_dropout(any_model)
    add_lora(any_model, 2, 4.0, 0.5)
    assert torch.equal(logits(any_model), expected), "B is zero at the start"
    for layer in adapters(any_model).values():
        torch.nn.init.ones_(layer.lora_B)
    assert not torch.equal(logits(any_model), expected)
    with lora_disabled(any_model.train()):
        assert torch.equal(logits(any_model), expected)
    assert all(layer.enabled for layer in adapters(any_model).values())


def test_only_adapters_are_trainable_and_every_block_matrix_has_one(any_model: PreTrainedModel) -> None:
    parameters = add_lora(any_model, 2, 4.0)
    trainable = [name for name, parameter in any_model.named_parameters() if parameter.requires_grad]
    assert len(parameters) == len(trainable) and all(".lora_" in name for name in trainable)
    matrices = [
        name for name, parameter in any_model.named_parameters() if parameter.ndim == 2 and ".base.weight" in name
    ]
    assert len(matrices) * 2 == len(trainable) and len(matrices) >= 16


def test_merged_equals_adapted(any_model: PreTrainedModel) -> None:
    names = list(any_model.state_dict())
    add_lora(any_model, 2, 4.0)
    for layer in adapters(any_model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(3))
    expected = logits(any_model)
    merge_lora(any_model)
    torch.testing.assert_close(logits(any_model), expected, rtol=1e-4, atol=1e-4)
    assert list(any_model.state_dict()) == names


def test_dropout_depends_on_the_row_alone() -> None:
    """Neither padding nor the other rows of a micro-batch change a row's mask; another key does."""
    model = adapted(dropout=0.4).train()
    set_dropout_rows(model, torch.tensor([7, 9]))
    together = logits(model)
    padded = torch.nn.functional.pad(INPUT[1:], (0, 5))
    set_dropout_rows(model, torch.tensor([9]))
    alone = model(input_ids=padded, use_cache=False).logits[:, : INPUT.shape[1]]
    torch.testing.assert_close(alone, together[1:], rtol=1e-5, atol=1e-5)
    set_dropout_rows(model, torch.tensor([10]))
    assert not torch.allclose(model(input_ids=INPUT[1:], use_cache=False).logits, together[1:], atol=1e-3)


def test_dropout_keeps_the_mean_and_the_rate() -> None:
    layer = next(iter(adapters(adapted(dropout=0.25)).values())).train()
    set_dropout_rows(layer, torch.arange(64))
    x = torch.ones(64, 50, 32)
    dropped = ~keep_mask(layer.rows, 50, 32, layer.dropout)
    assert abs(dropped.float().mean().item() - 0.25) < 0.005
    assert dropped.float().mean(dim=(0, 1)).std() < 0.02, "no feature is dropped more often than another"
    with torch.no_grad():
        trained, base = layer(x).mean(dim=(0, 1)), layer.base(x)[0, 0]
        whole = layer.eval()(x)[0, 0]
    torch.testing.assert_close(trained - base, whole - base, rtol=0.02, atol=0.02)


def test_unknown_target() -> None:
    with pytest.raises(UserError, match="query_key_value.*found 'q_proj'"):
        add_lora(tiny_model(), 2, 4.0, targets=["q_proj"])


def test_adapter_of_another_model(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, "somebody/model")
    with pytest.raises(UserError, match="expected"):
        load_adapter(tiny_model(depth=3), tmp_path)
    with pytest.raises(UserError, match="adapter"):
        load_adapter(tiny_model(), tmp_path / "nowhere")
