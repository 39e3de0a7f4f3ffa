"""Reading and writing weights: what `from_pretrained` reads, tensor for tensor, and only whole checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from unlearn.errors import UserError
from unlearn.model import empty_model, load_model, save_model
from unlearn.weights import Checkpoint, fill, materialise, shared_folder

CPU = torch.device("cpu")


def same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Equal parameters and buffers, to the bit, and equally tied."""
    for (name, tensor), (other_name, other) in zip(
        ours.state_dict(keep_vars=True).items(), theirs.state_dict(keep_vars=True).items(), strict=True
    ):
        assert name == other_name and tensor.dtype == other.dtype and torch.equal(tensor, other), name
    for (name, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert buffer.dtype == other.dtype and torch.equal(buffer, other), name
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_from_pretrained_reads(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Rotary frequencies are in no checkpoint, and rounding them to bfloat16 spoils long contexts."""
    any_model.save_pretrained(tmp_path)
    same(load_model(str(tmp_path), dtype=dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))


@pytest.mark.parametrize("tied", [True, False])
def test_what_we_write_transformers_reads(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unlearn.weights.FILE_BYTES", 20_000)  # several files and an index
    model = tiny_model("llama", tie_word_embeddings=tied)
    save_model(model, tokenizer, tmp_path / "model")
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    same(load_model(str(tmp_path / "model")), model)


def test_neox_names_are_the_hubs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """`lm_head.weight` in memory is `embed_out.weight` in every NeoX checkpoint."""
    save_model(tiny_model(), tokenizer, tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")


def test_a_checkpoint_of_the_base_model_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The hub's GPT-2 has `h.0...` for what is `transformer.h.0...` in memory."""
    model = tiny_model("gpt2")
    save_model(model, tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    same(load_model(str(tmp_path)), model)


def test_a_part_alone_leaves_the_rest_without_memory(home: Path) -> None:
    model = empty_model(str(home / "model"))
    fill(model, Checkpoint.open(str(home / "model")), CPU, part=model.get_output_embeddings())
    whole = load_model(str(home / "model"))
    assert torch.equal(model.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    assert model.get_input_embeddings().weight.is_meta


def sharded_copy(home: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("unlearn.weights.FILE_BYTES", 20_000)
    save_model(load_model(str(home / "model")), tokenizer, folder)
    return folder


def test_missing_and_short_files(
    home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded_copy(home, tmp_path / "model", tokenizer, monkeypatch)
    second = sorted(folder.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_model(str(folder))
    second.unlink()
    with pytest.raises(UserError, match=f"expected the file {second.name} in .* as its index says"):
        load_model(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_model(str(folder))
    index.unlink()
    with pytest.raises(UserError, match="found model-00001-of-.* which transformers does not read either"):
        load_model(str(folder))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="convert its weights to safetensors"):
        load_model(str(folder))


def test_another_models_shapes(home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_model(tiny_model(), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"expected gpt_neox.layers.0.mlp\S+ of shape \(40.*found \(48"):
        load_model(str(tmp_path))


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), shared_folder(tmp_path / "model") as temporary:
        (temporary / "file").write_text("half")
        raise KeyError("a bug")
    assert list(tmp_path.iterdir()) == []
    with shared_folder(tmp_path / "model") as temporary:
        (temporary / "file").write_text("whole")
    assert (tmp_path / "model" / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_buffers_may_go_elsewhere_than_weights() -> None:
    """With --offload-reference the original's rotary frequencies were left on the CPU, and copied in every pass."""
    model = tiny_model("llama")
    materialise(model, CPU, torch.device("meta"))
    assert all(buffer.is_meta for buffer in model.buffers()) and not any(p.is_meta for p in model.parameters())
