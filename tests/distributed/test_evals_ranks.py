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

from evals.evaluation import Evaluation
from evals.lm import LiveModel
from unlearn.errors import UserError

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
