"""Evaluation on several gloo ranks: the same bits at any number of them, plain and sharded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from evals_support import make_model, make_tokenizer, question, write_wmdp
from harness import run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.harness.lm import LiveModel
from unlearn.sharding import shard as shard_rows
from unlearn.sharding import shard_mesh

PAIRS = [(f"Which planet {'is red and ' * (i % 9)}is number {i}? Answer:", f" {c}") for i in range(9) for c in "ABCD"]
PAIRS += [("The quick brown fox", " jumps over the lazy dog"), ("The lazy dog", " again")]


def requests() -> list[Any]:
    return [SimpleNamespace(args=pair, task_name="test") for pair in PAIRS]


def scores(kind: str, dtype: torch.dtype = torch.float32, sharded: str = "") -> list[tuple[float, bool]]:
    model = make_model(kind, dtype=dtype)
    if sharded:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        parts = [model.model.embed_tokens, *model.model.layers, *([model.lm_head] if sharded == "head too" else [])]
        for part in parts:
            fully_shard(part, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    model.train()
    live = LiveModel(model, make_tokenizer(), batch_tokens=150)
    result = live.loglikelihood(requests(), disable_tqdm=True)
    assert len(live.plans[0].batches) % 2 == 1, "with 2 ranks one runs a dummy row"
    return result


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_ranks_agree_to_the_bit(kind: str) -> None:
    torch.set_num_threads(1)  # as in the ranks: threads split sums differently
    alone = scores(kind)
    for world_size in (2, 3):
        assert run_ranks(world_size, scores, kind) == [alone] * world_size


@pytest.mark.parametrize("sharded", ["blocks", "head too"])
def test_sharded_model_in_mixed_precision_scores_as_a_bfloat16_model(sharded: str) -> None:
    """FSDP2 gathers bfloat16 copies of float32 weights; the head must see those, in float32."""
    torch.set_num_threads(1)
    whole = scores("llama", dtype=torch.bfloat16)
    assert run_ranks(2, scores, "llama", torch.float32, sharded) == [whole, whole]


def test_limit_of_one_on_two_ranks(tmp_path: Path) -> None:
    """lm-eval's own splitting crashes here: the second rank has no question."""
    write_wmdp(tmp_path, [question(i, i % 4, None) for i in range(6)])

    def evaluate() -> dict[str, Any]:
        evaluation = Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=tmp_path, limit=1)
        result = evaluation.run(make_model("neox"))
        evaluation.write(result, tmp_path / "out", samples=True)
        return {"samples": result["samples"], "results": result["results"], "ranks": result["unlearn"]["world_size"]}

    first, second = run_ranks(2, evaluate)
    assert first == second and first["ranks"] == 2
    assert len(first["samples"]["wmdp_bio"]) == 1
    assert len(list((tmp_path / "out").rglob("*"))) == 3, "one rank wrote one folder with two files"


def test_ranks_that_plan_different_work_raise() -> None:
    def differ() -> None:
        live = LiveModel(make_model("neox"), make_tokenizer(), batch_tokens=100 + 100 * dist.get_rank())
        live.loglikelihood(requests(), disable_tqdm=True)

    with pytest.raises(UserError, match="same questions on every rank"):
        run_ranks(2, differ)


def test_harness_brings_a_failure_of_one_rank_home() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise UserError("rank 1 says no")
        dist.barrier()

    with pytest.raises(UserError, match="rank 1 says no"):
        run_ranks(2, fail)


GENERATIONS = [
    (f"Which {'is red and ' * (i % 4)}is number {i}?", {"until": ["e"], "max_gen_toks": 3 + i % 3}) for i in range(7)
]
TEXTS = [("The quick brown fox jumps over the lazy dog. " * (1 + 3 * i),) for i in range(5)]


def shard(model: Any, **options: Any) -> Any:
    """Blocks, embedding, final norm, head and root each a unit of its own, as in full training."""
    base = model.base_model
    layers = base.layers
    norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
    for part in [model.get_input_embeddings(), *layers, norm, model.get_output_embeddings()]:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def shard_as_training_does(model: Any, shard_size: int | None) -> Any:
    """`unlearn.sharding` over all ranks, or over groups of `shard_size`."""
    mesh = shard_mesh("hybrid" if shard_size else "full", shard_size, torch.device("cpu"))
    shard_rows(model, mesh, compute=torch.float32)
    return model


def scores_of_hybrid(kind: str, shard_size: int | None) -> list[tuple[float, bool]]:
    model = shard_as_training_does(make_model(kind), shard_size)
    return LiveModel(model, make_tokenizer(), batch_tokens=150).loglikelihood(requests(), disable_tqdm=True)


def test_layouts_of_training_give_the_same_bits() -> None:
    """Full and hybrid sharding on four ranks; tied weights stay with the root."""
    torch.set_num_threads(1)
    for kind, shard_size in (("gemma2", None), ("neox", 2)):
        assert run_ranks(4, scores_of_hybrid, kind, shard_size) == [scores(kind)] * 4


def every_kind(kind: str, sharded: bool = False) -> tuple[list[Any], list[float], list[str]]:
    """Letters and full answers, perplexities, and texts."""
    model = make_model(kind)
    model.train()
    flags = [module.training for module in model.modules()]
    live = LiveModel(shard(model) if sharded else model, make_tokenizer(), batch_tokens=150)
    found = (
        live.loglikelihood(requests(), disable_tqdm=True),
        live.loglikelihood_rolling([SimpleNamespace(args=t, task_name="t") for t in TEXTS], disable_tqdm=True),
        live.generate_until([SimpleNamespace(args=g, task_name="t") for g in GENERATIONS], disable_tqdm=True),
    )
    assert [module.training for module in model.modules()] == flags
    if sharded:  # the weights are shards again: nothing whole stays in memory
        assert all(hasattr(parameter, "placements") for parameter in model.parameters())
    return found


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_every_kind_of_request_is_the_same_to_the_bit_on_sharded_models(kind: str) -> None:
    """Uneven: 3 ranks run out of batches, and stop writing, at different times."""
    torch.set_num_threads(1)
    alone = every_kind(kind)
    assert len(set(alone[2])) > 2
    for world_size in (1, 2, 3):
        assert run_ranks(world_size, every_kind, kind) == [alone] * world_size
        assert run_ranks(world_size, every_kind, kind, True) == [alone] * world_size


def test_evaluation_between_training_steps_of_a_sharded_model_changes_nothing() -> None:
    """A step, an evaluation, a step: the weights and losses of two steps alone."""

    def losses(evaluated: bool) -> list[float]:
        model = shard(make_model("llama"))
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids, found = torch.arange(40).view(2, 20) + dist.get_rank(), []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if evaluated:
                LiveModel(model, make_tokenizer(), batch_tokens=150).loglikelihood(requests(), disable_tqdm=True)
        return found

    assert run_ranks(2, losses, True) == run_ranks(2, losses, False)


def test_whole_evaluation_with_orders_and_subsample_on_four_ranks(tmp_path: Path) -> None:
    write_wmdp(tmp_path, [question(i, i % 4, None) for i in range(11)])

    def evaluate(sharded: bool = False) -> dict[str, Any]:
        model = make_model("neox")
        evaluation = Evaluation(
            make_tokenizer(), tasks=["wmdp_bio"], data_dir=tmp_path, subsample=7, permute=True, batch_tokens=300
        )
        own = evaluation.run(shard(model) if sharded else model)["unlearn"]
        return {key: own[key] for key in ("summary", "questions", "batches")}

    torch.set_num_threads(1)
    alone = evaluate()
    assert alone["summary"]["wmdp_bio"]["questions"] == 7 and alone["batches"] % 4 != 0
    assert run_ranks(4, evaluate) == [alone] * 4
    assert run_ranks(2, evaluate, True) == [alone] * 2


def test_a_task_that_fails_on_one_rank_fails_on_all() -> None:
    """NaN comes from one rank's rows; every rank must hear of it."""

    def broken() -> None:
        model = make_model("neox")
        if dist.get_rank() == 1:
            model.gpt_neox.final_layer_norm.weight.data[0] = float("nan")
        LiveModel(model, make_tokenizer(), batch_tokens=150).loglikelihood(requests(), disable_tqdm=True)

    with pytest.raises(UserError, match="found NaN in"):
        run_ranks(2, broken)
