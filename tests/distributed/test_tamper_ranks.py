"""The attack at several ranks: the same curves, full or LoRA, replicated or sharded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_support import question, write_questions, write_wmdp
from harness import run_ranks

from unlearn.assemble import build
from unlearn.config import configure
from unlearn.distributed import rank
from unlearn.errors import UserError
from unlearn.evals import tamper
from unlearn.model import fresh_weights, load_model
from unlearn.weights import full

pytestmark = pytest.mark.usefixtures("token_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_wmdp(root, [question(i, i % 4, None) | {"attacked": i % 2 == 0} for i in range(30)])
    write_questions(root / "embedded-world/questions/general", [question(i, i % 4, None) for i in range(30)])
    return root


def attack(home: Path, data: Path, output: Path, *more: object) -> dict[str, Any]:
    """Run the command on this rank; attack.json with what depends on the folder left out."""
    flags = ["tamper.py", "--model", home / "model", "--forget", home / "forget.jsonl", "--output", output]
    flags += "--batch 4 --micro-batch 2 --seq-len 24 --eval-every 2 --dtype fp32 --eval-tasks wmdp_bio".split()
    flags += ["world_general_cloze", "--general-tasks", "world_general_cloze", "--data-dir", data, *more]
    sys.argv = [str(word) for word in flags]
    tamper.main()
    found: dict[str, Any] = json.loads((output / "attack.json").read_text())
    del found["config"]
    return found


GRID = (
    "--examples",
    16,
    "--adam-lr",
    "1e-2",
    "--split-by",
    "attacked",
    "--control",
    "random",
    "--grid",
    "lora-rank=0,2",
)


def test_curves_are_the_same_at_one_and_two_ranks(home: Path, data: Path, tmp_path: Path) -> None:
    """Batches of two micro-batches: the weights, and so the answers, are equal to the bit, replicated and sharded."""
    more = (*GRID, "--data", "mix", "--retain", home / "retain.jsonl")
    (one,) = run_ranks(1, attack, home, data, tmp_path / "one", *more)
    assert {len(subject["attacks"]) for subject in one["subjects"].values()} == {2}
    accuracies = {point["tasks"]["wmdp_bio"]["probability"] for point in one["points"]}
    assert len(accuracies) == 3, "the attack moves the model"
    for number, shard in enumerate((["--shard", "replicate"], ["--shard", "full"])):
        for two in run_ranks(2, attack, home, data, tmp_path / f"two-{number}", *more, *shard):
            assert two == one, shard


@pytest.mark.slow
def test_three_and_four_ranks_with_a_short_batch(home: Path, data: Path, tmp_path: Path) -> None:
    """14 windows in batches of 4; sums in another order: log-likelihoods within rounding."""
    more = ("--grid", "lora-rank=0,2", "--examples", 14, "--adam-lr", "1e-3", "--eval-every", 4)
    (one,) = run_ranks(1, attack, home, data, tmp_path / "one", *more)
    for ranks, layout in ((3, "full"), (4, "replicate"), (4, "hybrid --shard-size 2")):
        place = f"{ranks} {layout}"
        others = run_ranks(ranks, attack, home, data, tmp_path / place, *more, "--shard", *layout.split())
        for subject, of_one in one["subjects"].items():
            for name in of_one["attacks"]:
                expected, found = (
                    json.loads((tmp_path / folder / "attacks" / subject / name / "curve.json").read_text())["points"]
                    for folder in ("one", place)
                )
                for point, other in zip(expected, found, strict=True):
                    assert (point["step"], point["tokens"]) == (other["step"], other["tokens"])
                    for task in ("wmdp_bio", "world_general_cloze"):
                        key = "probability"
                        assert other["tasks"][task][key] == pytest.approx(point["tasks"][task][key], rel=2e-3)
        assert all(other == others[0] for other in others)


def fresh_model(home: Path, output: Path) -> dict[str, torch.Tensor]:
    """The random control's weights as they are before its first step, on this number of ranks."""
    config = configure(
        "next-token",
        model=str(home / "model"),
        forget=str(home / "forget.jsonl"),
        output=str(output),
        dtype="fp32",
        lora_rank=2,
        shard="full",
        seq_len=24,
        fresh_weights=True,
    )
    model = build(config, torch.device("cpu")).model
    return {name: full(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_random_control_is_fresh_on_any_number_of_ranks(home: Path, tmp_path: Path, world_size: int) -> None:
    expected = fresh_weights(str(home / "model"), 0)
    for weights in run_ranks(world_size, fresh_model, home, tmp_path):
        adapted = [name for name in weights if "lora_" in name]
        assert len(adapted) == 32 and all(weights[n].abs().sum() == 0 for n in adapted if n.endswith("lora_B"))
        for name, weight in weights.items():
            if name not in adapted:
                assert torch.equal(weight, expected(name.replace(".base.", "."))), name
    trained = load_model(str(home / "model")).state_dict()
    assert not torch.equal(expected("lm_head.weight"), trained["lm_head.weight"])


def one_rank_diverges(home: Path, data: Path, output: Path) -> str:
    flags = ["--examples", 16, "--grid", "adam-lr=1e30,1e-3", "--eval-every", 4, "--save-every", 1]
    found = attack(home, data, output, *flags)
    assert not list(output.rglob("checkpoints*"))
    reasons = [of_one["diverged"] for of_one in found["subjects"]["unlearned"]["attacks"].values()]
    assert reasons[1] is None
    return str(reasons[0])


def test_a_divergence_ends_one_attack_on_every_rank(home: Path, data: Path, tmp_path: Path) -> None:
    """While a checkpoint is being written."""
    for reason in run_ranks(2, one_rank_diverges, home, data, tmp_path / "out"):
        assert "NaN" in reason


def missing_control(home: Path, data: Path, output: Path) -> str:
    try:
        attack(home, data, output, "--control", f"original={output}-nowhere")
    except UserError as error:
        return f"{rank() >= 0} {error}"
    return "no error"


def test_a_missing_control_is_said_by_every_rank(home: Path, data: Path, tmp_path: Path) -> None:
    for message in run_ranks(2, missing_control, home, data, tmp_path / "out"):
        assert "True --control original: expected a model folder or a hub name" in message
