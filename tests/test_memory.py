"""The plan: its formula against the simulation, the simulation against a real allocator, and what train.py refuses."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import peak_bytes
from unlearn.assemble import build
from unlearn.blank import blank_lens, full_windows, needs_of
from unlearn.block_memory import measured_blocks
from unlearn.building import method_parts, method_terms, original_model, trained_model
from unlearn.config import TrainConfig, config_of, configure
from unlearn.errors import UserError
from unlearn.memory import GIB, NEOX, Layout, Shape, check_fits, flops_per_step, neighbours, peak_gib, terms
from unlearn.methods.terms import Loss
from unlearn.model import empty_model
from unlearn.plan import plan
from unlearn.plan_config import PlanConfig
from unlearn.simulate import simulated_peak
from unlearn.trainer import gradients
from unlearn.weights import materialise


def configured(folder: str, **flags: Any) -> TrainConfig:
    settings = {"layers": (2, 4, 6, 8), "seq_len": 256, "micro_batch": 4, "retain_start": 0.5} | flags
    return configure(model=folder, **settings)


def planned(**flags: Any) -> Any:
    """Flags of `python -m unlearn plan`."""
    return config_of("lens", PlanConfig)(**flags)


MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "muon on 4": (4, {"optimizer": "muon"}),
    "replicated alone": (1, {}),
    "lora": (2, {"lora_rank": 8, "lora_dropout": 0.0}),
    "lora, selective": (2, {"lora_rank": 8, "checkpoint_activations": "selective"}),
}
SLOW_MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "adamw on 8, l2": (8, {"retain_loss": "l2"}),
    "sharded alone": (1, {"shard": "full", "optimizer": "muon"}),
    "float32 on 2": (2, {"dtype": "fp32"}),
    "lora with dropout": (2, {"lora_rank": 8}),
    "lora, sharded, kl": (4, {"lora_rank": 8, "shard": "full", "retain_loss": "kl"}),
    "offloaded reference": (4, {"offload_reference": True}),
    "all activations": (4, {"checkpoint_activations": "none"}),
    "all activations of lora": (1, {"lora_rank": 8, "checkpoint_activations": "none"}),
    "selective": (4, {"optimizer": "muon", "checkpoint_activations": "selective"}),
    "mlps of the upper blocks": (4, {"train": r"layers\.[4-7]\.mlp", "layers": (8,), "optimizer": "muon"}),
    "the embedding alone": (1, {"train": "embed_in"}),
    "sgd": (2, {"optimizer": "sgd"}),
    "lora in the upper blocks": (2, {"lora_rank": 8, "lora_layers": (5, 6), "layers": (6, 8)}),
}
ATTACKS: dict[str, tuple[int, dict[str, Any]]] = {
    "sharded on 4": (4, {}),
    "alone": (1, {}),
    "lora": (2, {"lora_rank": 8}),
    "lora, sharded": (4, {"lora_rank": 8, "shard": "full"}),
    "float32, one window": (2, {"dtype": "fp32", "micro_batch": 1}),
    "all activations": (4, {"checkpoint_activations": "none"}),
}


@pytest.mark.parametrize("mode", [*MODES, *(pytest.param(mode, marks=pytest.mark.slow) for mode in SLOW_MODES)])
def test_formula_is_within_a_tenth_of_the_simulation(folder: str, mode: str) -> None:
    ranks, flags = (MODES | SLOW_MODES)[mode]
    config = configured(folder, **flags)
    layout = Layout.of(config, ranks, ranks)
    planned = peak_gib(config, Shape.of(empty_model(folder), config), layout, needs_of(config))
    assert planned == pytest.approx(simulated_peak(config, layout) / GIB, rel=0.10)


@pytest.mark.parametrize("mode", ATTACKS)
def test_formula_of_an_attack_is_within_a_tenth_of_the_simulation(folder: str, mode: str) -> None:
    """One term, no original: another moment is the fullest."""
    ranks, flags = ATTACKS[mode]
    config = configure("next-token", model=folder, seq_len=256, **({"micro_batch": 4} | flags))
    layout = Layout.of(config, ranks, ranks)
    planned = peak_gib(config, Shape.of(empty_model(folder), config), layout, needs_of(config))
    assert planned == pytest.approx(simulated_peak(config, layout) / GIB, rel=0.10)


OUTPUTS = {
    "npo": (4, {}),
    "undial": (2, {"lora_rank": 8}),
    "wga": (4, {}),
    "idk": (4, {}),
    "ignorant-teacher": (4, {}),
    "distill": (1, {}),
    "distort": (4, {}),
    "npo beside an adversary": (4, {"adversary": "relearn", "adversary_rank": 8}),
    "rmu beside an adversary": (2, {"adversary": "relearn", "adversary_rank": 8, "lora_rank": 8, "layers": (4,)}),
    "npo beside an adversary, alone": (1, {"adversary": "relearn", "adversary_rank": 32}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("wga", "distort") else ()) for name in OUTPUTS],
)
def test_formula_of_other_methods_is_within_a_tenth_of_the_simulation(folder: str, name: str) -> None:
    ranks, flags = OUTPUTS[name]
    config = configure(name.partition(" ")[0], model=folder, seq_len=256, micro_batch=4, **flags)
    layout = Layout.of(config, ranks, ranks)
    planned = peak_gib(config, Shape.of(empty_model(folder), config), layout, needs_of(config))
    assert planned == pytest.approx(simulated_peak(config, layout) / GIB, rel=0.10)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 1792},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 2704},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 2048},
    "gpt2": {"n_positions": 1024},
}
FAMILIES = [
    (name, kind, rank)
    for name in SHAPES
    for kind, rank in (("full", 8), ("none", 8), ("full", 0), ("selective", 0), ("none", 0))
]
QUICK = (("llama", "none", 8), ("gemma2", "full", 8), ("qwen2", "selective", 0))


@pytest.mark.parametrize(
    ("name", "kind", "rank"), [pytest.param(*at, marks=() if at in QUICK else pytest.mark.slow) for at in FAMILIES]
)
def test_formula_of_other_architectures_is_within_an_eighth(name: str, kind: str, rank: int, tmp_path: Path) -> None:
    """By what one of their own blocks keeps: by GPT-NeoX's, they were planned up to a half too low."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8009}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name} | sizes | SHAPES[name]))
    more: dict[str, Any] = {"lora_rank": rank} if rank else {"shard": "full"}
    config = configured(str(tmp_path), checkpoint_activations=kind, **more)
    layout = Layout.of(config, 4, 4)
    planned = peak_gib(config, Shape.of(empty_model(str(tmp_path)), config), layout, needs_of(config))
    assert 0.95 < planned * GIB / simulated_peak(config, layout) < 1.125


def test_a_block_of_gpt_neox_is_measured_as_planned(folder: str) -> None:
    """Its own numbers were fitted to the simulation of whole steps; one block by itself says nearly the same."""
    for rank in (0, 8):
        config = configured(folder, lora_rank=rank)
        found = measured_blocks(config, empty_model(folder).config)
        for kind, (kept, beside) in NEOX.items():
            assert found[kind][0] == pytest.approx(kept, rel=0.05), (kind, rank)
            assert found[kind][1] == pytest.approx(beside, rel=0.25), (kind, rank)


def allocated(config: TrainConfig) -> int:
    """Peak bytes that a real allocator gave out over the same steps, in one process."""
    device = torch.device("cpu")

    def steps() -> None:
        model, original = trained_model(config, None), original_model(config, None, needs_of(config))
        lens = partial(blank_lens, config, device=device)
        materialise(model, device)
        if original is not None:
            materialise(original, device)
        moments = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
        terms = method_terms(config, method_parts(config, model, original, full_windows(config, 1), lens, device))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        gradients(model, Loss(terms, frozen=[] if original is None else [original]), 1, 2)
        del moments

    return peak_bytes(steps)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 8, "lora_dropout": 0.0}])
def test_simulation_is_within_a_tenth_of_a_real_allocator(folder: str, flags: dict[str, Any]) -> None:
    config = configured(folder, dtype="fp32", shard="replicate", **flags)
    assert simulated_peak(config, Layout(1, 1)) == pytest.approx(allocated(config), rel=0.10)


def test_layouts_of_a_copy() -> None:
    config = configure(model="m")
    assert Layout.of(config, 1, 1) == Layout(1, 1) and Layout.of(config, 8, 4) == Layout(8, 8)
    hybrid = dataclasses.replace(config, shard="hybrid")
    assert Layout.of(hybrid, 8, 4) == Layout(8, 4)
    assert Layout.of(dataclasses.replace(hybrid, shard_size=2), 8, 4) == Layout(8, 2)
    assert Layout.of(configure(model="m", lora_rank=4), 8, 4) == Layout(8, 1)


def test_neighbours_need_less_and_are_sorted(folder: str) -> None:
    shape, layout = Shape.of(empty_model(folder), configured(folder)), Layout(4, 4)
    assert "--lora-rank 16" in {
        other.change
        for other in neighbours(configured(folder, optimizer="muon"), shape, layout, needs_of(configured(folder)))
    }
    config = configured(folder)
    found = neighbours(config, shape, layout, needs_of(config))
    assert {"--lora-rank 16", "8 GPUs", "--micro-batch 1"} <= {other.change for other in found}
    peaks = [other.peak_gib for other in found]
    assert peaks == sorted(peaks) and peaks[-1] < peak_gib(config, shape, layout, needs_of(config))


def test_a_run_that_cannot_fit_is_refused_by_term_and_remedy(folder: str) -> None:
    config = configured(folder, micro_batch=64)
    shape = Shape.of(empty_model(folder), config)
    with pytest.raises(
        UserError, match=r"fits into 0.5 GiB; found a planned peak of \d.*one block's backward.*: try --"
    ):
        check_fits(config, shape, Layout(4, 4), needs_of(config), 0.5)
    check_fits(config, shape, Layout(4, 4), needs_of(config), 80.0)


def test_train_refuses_before_it_reads(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.assemble.available_gib", lambda device: 1e-6)
    with pytest.raises(UserError, match="expected a run that fits"):
        build(configure(model=str(home / "model"), layers=(1,), forget="/nowhere.jsonl"), torch.device("cpu"))


def test_flops_of_full_training_by_hand(folder: str) -> None:
    shape = Shape.of(empty_model(folder), configured(folder))
    assert shape.matrices == 8 * 12 * 512**2 and shape.head == 8009 * 512
    config = configured(folder, layers=(8,), retain_coef=0.0, retain_start=0.0, checkpoint_activations="none", batch=2)
    tokens, needs = 2 * 256, needs_of(config)
    muon = dataclasses.replace(config, optimizer="muon", muon_method="quintic")
    s, long = 512, (1536, 512, 2048, 2048)
    per_block = sum(5 * (4 * s * s * side + 2 * s**3) for side in long)
    assert flops_per_step(muon, shape, needs) - flops_per_step(config, shape, needs) == 8 * per_block
    assert flops_per_step(config, shape, needs) == tokens * (6 * shape.matrices + 4 * shape.head + 4 * 512**2)


def test_plan_prints_tables_and_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": folder, "layers": (2, 4), "seq_len": 128, "micro_batch": 2}
    plan(planned(**settings))
    text = capsys.readouterr().out
    assert "together" in text and "fits into 88.0" in text and "PFLOP" in text
    plan(planned(**settings, json=True, verify=True, world_size=2))
    found = json.loads(capsys.readouterr().out)
    assert found["peak_gib"] == pytest.approx(sum(found["terms_gib"].values()))
    assert found["simulated_gib"] == pytest.approx(found["peak_gib"], rel=0.25)  # so small that temporaries count
    config = planned(**settings)
    named = terms(config, Shape.of(empty_model(folder), config), Layout(4, 4), needs_of(config))
    assert named.keys() == found["terms_gib"].keys()


def test_plan_refuses_a_world_that_does_not_divide(folder: str) -> None:
    with pytest.raises(UserError, match="multiple of the 4 GPUs that share a copy; found 6"):
        plan(planned(model=folder, layers=(2,), shard="hybrid", world_size=6))
    with pytest.raises(UserError, match="--layers in 0..8"):
        plan(planned(model=folder, layers=(9,)))
