"""`python -m unlearn plan`: print what a run will need; see `memory.py` for the formula and its notation."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from unlearn.blank import needs_of
from unlearn.choices import settled
from unlearn.errors import UserError
from unlearn.memory import GIB, Layout, Shape, flops_per_step, neighbours, terms
from unlearn.methods.terms import Needs
from unlearn.model import empty_model
from unlearn.plan_config import PlanConfig


def plan(config: PlanConfig) -> None:
    """Print the plan of a run, as tables or as JSON.

    Raises:
        UserError: no such model, or a layout that the number of GPUs does not divide into.
    """
    shape, needs = _shape(config), needs_of(config)
    config, chosen = settled(config, shape, needs, config.world_size, config.gpus_per_node, config.gpu_gib)  # type: ignore[assignment]
    layout = Layout.of(config, config.world_size, config.gpus_per_node)
    if layout.world_size % layout.shard != 0:
        raise UserError(
            f"expected --world-size to be a multiple of the {layout.shard} GPUs that share a copy; found "
            f"{layout.world_size}: change --shard-size"
        )
    found = _numbers(config, shape, layout, needs) | {"chosen": chosen}
    if config.verify:
        from unlearn.simulate import simulated_peak

        found["simulated_gib"] = simulated_peak(config, layout) / GIB
    print(json.dumps(found, indent=2) if config.json else _tables(config, found))


def _shape(config: PlanConfig) -> Shape:
    model = empty_model(config.model, revision=config.revision, dtype=torch.float32)
    config.check_depth(int(model.config.num_hidden_layers))
    config.check_blocks(int(model.config.num_hidden_layers))
    return Shape.of(model, config)


def _numbers(config: PlanConfig, shape: Shape, layout: Layout, needs: Sequence[Needs]) -> dict[str, Any]:
    by_term = {name: size / GIB for name, size in terms(config, shape, layout, needs).items()}
    flops = flops_per_step(config, shape, needs)
    seconds = flops / (config.tflops * 1e12 * config.world_size)
    steps = -(-(config.examples or 0) * config.epochs // config.batch)
    peak = sum(by_term.values())
    return {
        "parameters": shape.parameters,
        "world_size": layout.world_size,
        "ranks_of_a_copy": layout.shard,
        "terms_gib": by_term,
        "peak_gib": peak,
        "gpu_gib": config.gpu_gib,
        "fits": peak <= config.gpu_gib,
        "flops_per_step": flops,
        "tflops": config.tflops,
        "seconds_per_step": seconds,
        "steps": steps,
        "hours": steps * seconds / 3600,
        "neighbours": [{"change": n.change, "peak_gib": n.peak_gib} for n in neighbours(config, shape, layout, needs)],
    }


def _tables(config: PlanConfig, found: dict[str, Any]) -> str:
    kind = f"LoRA rank {config.lora_rank}" if config.lora_rank else "full training"
    lines = [
        f"{config.model}: {found['parameters']:,} parameters, {kind}, {config.optimizer}, {config.dtype}",
        f"{found['world_size']} GPU(s), {found['ranks_of_a_copy']} sharing a copy of the model",
        "",
        f"{'peak of one GPU':32}{'GiB':>8}",
    ]
    lines[2:2] = found["chosen"]
    lines += [f"  {name:30}{size:8.2f}" for name, size in found["terms_gib"].items() if size >= 0.005]
    verdict = "fits into" if found["fits"] else "does not fit into"
    lines.append(f"  {'together':30}{found['peak_gib']:8.2f}   {verdict} {config.gpu_gib:.1f}")
    if "simulated_gib" in found:
        lines.append(f"  {'simulated, without data':30}{found['simulated_gib']:8.2f}")
    if found["neighbours"]:
        lines += ["", f"{'what would need less':40}{'GiB':>8}"]
        lines += [f"  {other['change']:38}{other['peak_gib']:8.2f}" for other in found["neighbours"]]
    lines += [
        "",
        f"{found['flops_per_step'] / 1e15:.2f} PFLOP an optimizer step at full windows; at {config.tflops:g} TFLOP/s a "
        f"GPU {found['seconds_per_step']:.1f} s, {found['steps']:,} steps {found['hours']:.2f} h",
    ]
    return "\n".join(lines)
