"""Residual streams, loading and saving, for every architecture of the table."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DEPTH, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from unlearn.errors import UserError
from unlearn.losses import logits_of
from unlearn.model import (
    blocks,
    cast_parameters,
    disable_dropout,
    final_norm,
    load_model,
    load_tokenizer,
    residual_streams,
    save_model,
    softcap,
    unembedding,
)

INPUT = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0]])


def test_residual_streams_equal_hidden_states(any_model: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = any_model(INPUT, output_hidden_states=True, use_cache=False)
        streams = residual_streams(any_model, INPUT, range(DEPTH + 1))
    for layer in range(DEPTH):
        torch.testing.assert_close(streams[layer], expected.hidden_states[layer], rtol=0, atol=0)
    normed = final_norm(any_model)(streams[DEPTH])
    torch.testing.assert_close(normed, expected.hidden_states[DEPTH], rtol=0, atol=0)
    logits = logits_of(normed, unembedding(any_model), softcap(any_model))
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_forward_stops_at_the_deepest_layer(any_model: PreTrainedModel) -> None:
    reached = []
    for index, block in enumerate(blocks(any_model)):
        block.register_forward_hook(lambda *_, index=index: reached.append(index))
    any_model.get_output_embeddings().register_forward_hook(lambda *_: reached.append("head"))
    residual_streams(any_model, INPUT, [2, 1])
    assert reached == [0, 1]
    assert not any(block._forward_pre_hooks for block in blocks(any_model)), "hooks must not stay behind"


def test_right_padding_does_not_reach_real_tokens(any_model: PreTrainedModel) -> None:
    with torch.no_grad():
        padded = residual_streams(any_model, INPUT, [DEPTH])[DEPTH][1, :4]
        alone = residual_streams(any_model, INPUT[1:, :4], [DEPTH])[DEPTH][0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_streams(checkpointing: bool) -> None:
    """With activation checkpointing, hooks inside a block would fire again in the recomputation."""
    model, twin = tiny_model().train(), tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    streams = residual_streams(model, INPUT, [1, 3])
    (streams[1].square().sum() + streams[3].sum()).backward()
    states = twin(INPUT, output_hidden_states=True, use_cache=False).hidden_states
    (states[1].square().sum() + states[3].sum()).backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None or not other.grad.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            # single numbers may cancel: a rounding of the whole norm for each sum that a row takes part in
            assert (parameter.grad - other.grad).norm() <= 2**-24 * INPUT.numel() * DEPTH * other.grad.norm(), name


def test_disable_dropout() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    disable_dropout(model)
    assert torch.equal(model(INPUT).logits, model(INPUT).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_reloads_with_plain_transformers(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, dtype: torch.dtype
) -> None:
    cast_parameters(any_model, dtype)
    save_model(any_model, tokenizer, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert next(reloaded.parameters()).dtype == dtype
    with torch.no_grad():
        assert torch.equal(reloaded(INPUT).logits, any_model(INPUT).logits)
    assert load_tokenizer(str(tmp_path))("basalt garnet").input_ids == tokenizer("basalt garnet").input_ids
    assert (tmp_path / "generation_config.json").is_file()


def broken(home: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in (home / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_missing_folder_and_missing_hub_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing at"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no config.json|found none"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="hf download somebody/model"):
        load_model("somebody/model")


def test_unsupported_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="found 'bert'"):
        load_model(str(tmp_path))


def test_truncated_weights(home: Path, tmp_path: Path) -> None:
    file = broken(home, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_model(str(tmp_path / "broken"))


def test_missing_tensor_is_an_error_not_a_random_weight(home: Path, tmp_path: Path) -> None:
    """`from_pretrained` only reports missing keys and initialises them at random."""
    from safetensors.torch import load_file, save_file

    folder = broken(home, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 missing .*layers.1.mlp.dense_h_to_4h.weight"):
        load_model(str(folder))


def test_nan_in_weights(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(home, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity in gpt_neox.final_layer_norm.bias"):
        load_model(str(folder))
