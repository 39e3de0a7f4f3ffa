"""What a run chooses for itself, and that its choices change nothing but time and memory."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NEOX, tiny_model
from test_methods import config, gradients_of
from torch._dynamo.utils import counters

from unlearn.assemble import build, describe
from unlearn.blank import needs_of
from unlearn.choices import settled
from unlearn.config import TrainConfig, configure
from unlearn.lora import add_lora, lora_disabled, set_dropout_rows
from unlearn.memory import Layout, Shape, peak_gib
from unlearn.model import empty_model
from unlearn.sharding import checkpoint_blocks, compile_blocks

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")
LORA = {"lora_rank": 3, "lora_dropout": 0.2}


def choose(flags: TrainConfig, ranks: int, per_node: int, limit: float) -> tuple[TrainConfig, list[str]]:
    return settled(flags, Shape.of(empty_model(flags.model), flags), needs_of(flags), ranks, per_node, limit)


def peaks(flags: dict[str, Any], ranks: int) -> dict[str, float]:
    """Planned GiB by what is recomputed."""
    found = {}
    for kind in ("full", "selective", "none"):
        one = configure(**flags, checkpoint_activations=kind)
        found[kind] = peak_gib(one, Shape.of(empty_model(one.model), one), Layout.of(one, ranks, ranks), needs_of(one))
    return found


def test_recomputes_as_little_as_fits(folder: str) -> None:
    flags: dict[str, Any] = {"model": folder, "layers": (2, 4), "seq_len": 512, "micro_batch": 8}
    need = peaks(flags, 4)
    assert need["full"] < need["selective"] < need["none"]
    for kind, limit in (("none", 1.2 * need["none"]), ("selective", 1.2 * need["selective"]), ("full", need["full"])):
        chosen, lines = choose(configure(**flags), 4, 4, limit)
        assert chosen.checkpoint_activations == kind
        assert len(lines) == 1 and lines[0].startswith(f"--checkpoint-activations {kind}: ")
    given, lines = choose(configure(**flags, checkpoint_activations="full"), 4, 4, 1e9)
    assert given.checkpoint_activations == "full" and lines == []


def test_a_model_is_planned_by_its_own_blocks(tmp_path: Path) -> None:
    """A Llama's keep more than GPT-NeoX's of the same width: by those, a run would end for lack of memory."""
    need = {}
    for name in ("gpt_neox", "llama"):
        (tmp_path / "config.json").write_text(json.dumps(NEOX | {"model_type": name}))
        flags: dict[str, Any] = {"model": str(tmp_path), "layers": (2, 4), "seq_len": 512, "micro_batch": 8}
        need[name] = peaks(flags, 4)
    assert need["llama"]["none"] > 1.1 * need["gpt_neox"]["none"]
    chosen, lines = choose(configure(**flags), 4, 4, need["gpt_neox"]["none"] * 1.1)
    assert chosen.checkpoint_activations == "selective" and lines[0].startswith("--checkpoint-activations selective: ")


def test_hybrid_across_nodes_where_a_copy_fits(folder: str) -> None:
    flags: dict[str, Any] = {"model": folder, "layers": (2, 4), "checkpoint_activations": "full"}
    chosen, lines = choose(configure(**flags), 8, 4, 1e9)
    assert chosen.shard == "hybrid" and "each node's 4 ranks share a copy" in lines[0]
    chosen, lines = choose(configure(**flags), 8, 4, 1e-3)
    assert chosen.shard == "full" and "a copy on each node would need" in lines[0]
    for ranks, per_node, more in ((4, 4, {}), (4, 1, {}), (6, 4, {}), (8, 4, LORA), (8, 4, {"shard": "full"})):
        plain = configure(**flags, **more)
        assert choose(plain, ranks, per_node, 1e9) == (plain, [])


def test_a_run_says_what_it_chose(home: Path) -> None:
    run = build(config(home), CPU)
    assert run.config.checkpoint_activations == "none"
    assert "--checkpoint-activations none: planned" in describe(run)


@pytest.mark.parametrize("flags", [LORA, {}, LORA | {"dtype": "bf16"}], ids=["lora", "full", "lora in bf16"])
def test_recomputation_changes_no_bit(home: Path, flags: dict[str, Any]) -> None:
    found = {}
    for kind in ("none", "selective", "full"):
        run = build(config(home, **flags, checkpoint_activations=kind), CPU)
        run.model.train()
        gradients_of(run, 1)
        found[kind] = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    for kind in ("selective", "full"):
        assert all(torch.equal(one, other) for one, other in zip(found["none"], found[kind], strict=True)), kind


def test_selective_computes_no_product_again() -> None:
    """A block's products with inputs and weights, forward, and nothing but its gradients' backward."""

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    found = {}
    for kind in ("none", "selective", "full"):
        model = tiny_model().train()
        if kind != "none":
            checkpoint_blocks(model, kind)  # type: ignore[arg-type]
        with Products() as products:
            model(input_ids=torch.arange(12)[None], use_cache=False).logits.sum().backward()
        found[kind] = products.count
    assert found["selective"] == found["none"] < found["full"]


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("full", 3), *(pytest.param(*at, marks=pytest.mark.slow) for at in (("full", 0), ("selective", 3), ("none", 3)))],
)
def test_a_compiled_model_has_a_graph_for_all_its_blocks(monkeypatch: pytest.MonkeyPatch, kind: str, rank: int) -> None:
    """Trained, and read without a gradient, and with the adapters off; the first block's input needs no gradient with
    adapters. Another length of windows makes them anew, the third length and measurements do not."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(depth=12)
    if rank:
        add_lora(model, rank, 6.0, 0.1)
    if kind != "none":
        checkpoint_blocks(model, kind, rank)  # type: ignore[arg-type]
    compile_blocks(model)
    graphs = []
    for length in (16, 24, 13):
        for step in range(2):
            ids = torch.arange(2 * length).reshape(2, length) % 50
            set_dropout_rows(model.train(), torch.tensor([step + 1, step + 5]))
            model(input_ids=ids, use_cache=False).logits.sum().backward()
            with torch.no_grad(), lora_disabled(model):
                model(input_ids=ids, use_cache=False)
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
                model.eval()(input_ids=ids[:, 3:], use_cache=False)
        graphs.append(counters["stats"]["unique_graphs"])
    kinds = 4 if rank else 2
    assert graphs == [kinds, 2 * kinds, 2 * kinds] and not counters["recompile_limit"]
