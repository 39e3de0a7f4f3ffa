"""FSDP2 models against their single-process twins: loading, logits, gradients, export; odd sizes, tied heads."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from harness import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from unlearn.errors import UserError
from unlearn.lora import add_lora, initial_adapters, merge_lora, save_adapter
from unlearn.losses import next_token
from unlearn.model import (
    disable_dropout,
    empty_model,
    final_norm,
    load_model,
    residual_streams,
    save_model,
    through_head,
)
from unlearn.sharding import checkpoint_blocks, reshard, shard, shard_mesh
from unlearn.weights import Checkpoint, fill, full, local_rows, shared_folder

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 2, 7, 11], [4, 4, 8, 1, 3]])


def sharded(path: str, kind: Any = "full", size: int | None = None, rank: int = 0) -> PreTrainedModel:
    model = empty_model(path)
    if rank:
        add_lora(model, rank, alpha=4.0, seed=3)
    checkpoint_blocks(model, "full")
    mesh = shard_mesh(kind, size, CPU)
    assert mesh is not None
    shard(model, mesh, compute=torch.float32)
    fill(model, Checkpoint.open(path), CPU, initial=initial_adapters(model))
    return model


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of one loss on h[2], where the forward pass ends early, and of one through final norm and unembedding."""
    disable_dropout(model)
    model.train()
    stream = residual_streams(model, IDS, [2])[2]
    stream.square().mean().backward()
    depth = model.config.num_hidden_layers
    hidden = final_norm(model)(residual_streams(model, IDS, [depth])[depth]).flatten(0, 1)
    targets, weights = IDS.flatten() % model.config.vocab_size, torch.full((IDS.numel(),), 0.1)
    through_head(model, hidden, lambda h, u: next_token(h, u, targets, weights))[0].backward()
    return {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def load_and_differentiate(path: str, kind: str, size: int | None) -> dict[str, Any]:
    model = sharded(path, kind, size)
    ids = IDS % model.config.vocab_size
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    rows = {name: (local_rows(p)[1], local_rows(p)[0].shape[0]) for name, p in model.named_parameters()}
    weights = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
        reshard(model)
    return {"weights": weights, "logits": logits, "gradients": gradients(model), "rows": rows}


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "gemma2"])  # untied, tied and Conv1D, tied and soft-capped
def test_a_sharded_model_is_its_twin(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_model(tiny_model(kind), tokenizer, tmp_path)
    twin = load_model(str(tmp_path))
    with torch.no_grad():
        logits = twin(IDS).logits
    expected = gradients(twin)
    for world_size, layout, size in ((1, "full", None), (2, "full", None), (3, "full", None), (4, "hybrid", 2)):
        for result in run_ranks(world_size, load_and_differentiate, str(tmp_path), layout, size):
            for name, parameter in twin.named_parameters():
                assert torch.equal(result["weights"][name], parameter), name
            torch.testing.assert_close(result["logits"], logits, rtol=0, atol=1e-6)
            assert result["gradients"].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-5, atol=1e-7)
    rows = [
        result["rows"]["transformer.wte.weight" if kind == "gpt2" else next(iter(result["rows"]))]
        for result in run_ranks(3, load_and_differentiate, str(tmp_path), "full", None)
    ]
    assert rows == [(0, 101), (101, 101), (202, 99)]  # 301 rows over 3 ranks


def test_fewer_rows_than_ranks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A vocabulary of 3 leaves the fourth rank an empty shard."""
    save_model(tiny_model(vocab_size=3), tokenizer, tmp_path)
    twin = load_model(str(tmp_path))
    with torch.no_grad():
        logits = twin(IDS % 3).logits
    for result in run_ranks(4, load_and_differentiate_small, str(tmp_path)):
        torch.testing.assert_close(result, logits, rtol=0, atol=1e-6)


def load_and_differentiate_small(path: str) -> Tensor:
    model = sharded(path)
    with torch.no_grad():
        logits = model(IDS % 3).logits
    loss = model(IDS % 3).logits.square().mean()
    loss.backward()
    return logits


def export(path: str, folder: Path, rank: int) -> Tensor:
    model = sharded(path, rank=rank)
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            rows, first = local_rows(parameter)
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            rows.add_(0.1 * noise[first : first + rows.shape[0]])
    if rank:
        with shared_folder(folder / "adapter") as temporary:
            save_adapter(model, temporary, path)
        merge_lora(model)
    with torch.no_grad():
        logits = model(IDS).logits
    with shared_folder(folder / "model") as temporary:
        save_model(model, TOKENIZER[0], temporary)
    return logits


TOKENIZER: list[PreTrainedTokenizerFast] = []  # reaches the ranks by fork


@pytest.mark.parametrize("rank", [0, 3])
def test_what_ranks_export_together_is_the_live_model(
    home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr("unlearn.weights.FILE_BYTES", 20_000)
    TOKENIZER[:] = [tokenizer]
    logits = {}
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        logits[world_size] = run_ranks(world_size, export, str(home / "model"), folder, rank)
        assert sorted(os.listdir(folder)) == (["adapter", "model"] if rank else ["model"])
        reloaded = AutoModelForCausalLM.from_pretrained(folder / "model")
        with torch.no_grad():
            for live in logits[world_size]:
                assert torch.equal(reloaded(IDS).logits, live)
    assert torch.equal(logits[2][0], logits[3][0])


def mesh_error(kind: str, size: int | None) -> str:
    try:
        shard_mesh(kind, size, CPU)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "no error"


def test_a_world_that_does_not_divide_into_the_mesh() -> None:
    for size in (2, 3, 1, 5):
        for message in run_ranks(3, mesh_error, "hybrid", size):
            assert "divides 3 ranks into two groups or more" in message and f"found {size}" in message
    assert run_ranks(4, mesh_error, "hybrid", 2) == ["no error"] * 4
