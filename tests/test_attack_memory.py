"""What an attack will need, before it starts: the formula against the same step on tensors without data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evals_support import question, write_wmdp
from test_memory import NEOX

from evals import tamper
from evals.attack_memory import as_training, attack_terms, check_attacks_fit
from evals.fine_tuning import AttackFlags
from evals.tamper_config import TamperConfig
from unlearn.blank import full_windows
from unlearn.building import master_dtype, trained_model
from unlearn.config import TrainConfig
from unlearn.data import Batches, Corpus
from unlearn.errors import UserError
from unlearn.memory import Layout, Shape
from unlearn.methods.retain import prediction
from unlearn.methods.terms import Loss, Term
from unlearn.model import empty_model
from unlearn.precision import DTYPES, autocast
from unlearn.sharding import shard_mesh
from unlearn.simulate import counting, fake_ranks, in_a_process, optimizer_states
from unlearn.trainer import clip_gradients, gradients
from unlearn.weights import materialise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder that holds nothing but config.json."""
    path = tmp_path_factory.mktemp("neox")
    (path / "config.json").write_text(json.dumps(NEOX))
    return str(path)


def planned(folder: str, ranks: int, **flags: Any) -> tuple[TamperConfig, Batches, TrainConfig, Layout]:
    """An attack with full windows of 256 tokens, four of them a micro-batch."""
    given: dict[str, Any] = {"micro_batch": 4, "batch": 8 * ranks} | flags
    config = TamperConfig(model=folder, output="o", corpus="c", **given)
    windows = [np.zeros(256, dtype=np.int32)] * config.batch
    count = len(windows)
    batches = Batches(
        Corpus("c", count, windows), examples=count, total=count, batch=config.batch, seed=0, tag="attack"
    )
    (attack,) = config.attacks()
    attacked = AttackFlags.of(config, config.subjects()[0], attack)
    training = as_training(attacked, batches, config.shard_kind(attack, ranks), None, ranks)
    return config, batches, training, Layout.of(training, ranks, ranks)


def simulated(config: TrainConfig, layout: Layout) -> int:
    """Peak bytes of the attack's own step."""

    def step() -> int:
        with fake_ranks(layout.world_size) as fake:
            mesh = shard_mesh(config.shard_kind(layout.world_size), None, CPU)
            model, windows = trained_model(config, mesh), full_windows(config, layout.world_size)["retain"]
            compute = DTYPES[config.dtype]
            with fake, counting() as counter:
                materialise(model, CPU)
                precision = autocast(master_dtype(config) if mesh is None else compute, compute, CPU)
                held = optimizer_states(config, model)
                model.train()
                gradients(model, Loss([Term("text", windows, prediction(model))], precision), 1, 2)
                parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
                clip_gradients(parameters, 1.0, torch.ones(()))
                del held
                return counter.peak

    return in_a_process(step)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (4, {}),
        (1, {}),
        (2, {"lora_rank": (8,)}),
        (4, {"lora_rank": (8,), "shard": "full"}),
        (2, {"dtype": "fp32", "micro_batch": 1}),
        (4, {"checkpoint_activations": False}),
    ],
    ids=str,
)
def test_formula_is_within_a_tenth_of_the_simulation(folder: str, ranks: int, flags: dict[str, Any]) -> None:
    _, _, training, layout = planned(folder, ranks, **flags)
    found = sum(attack_terms(training, Shape.of(empty_model(folder)), layout).values())
    assert found == pytest.approx(simulated(training, layout), rel=0.10)


def test_an_attack_is_planned_for_the_windows_that_it_draws(folder: str) -> None:
    """And not for those that --seq-len and --micro-batch allow."""
    config, _, training, _ = planned(folder, 2, micro_batch=64, batch=6)
    assert (training.micro_batch, training.seq_len, config.seq_len) == (3, 256, 2048)


def test_an_attack_that_cannot_fit_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batches, _, _ = planned(folder, 1)
    (attack,) = config.attacks()
    check_attacks_fit(config, {attack: batches}, CPU)
    monkeypatch.setattr("evals.attack_memory.available_gib", lambda device: 0.25)
    with pytest.raises(
        UserError, match=r"expected an attack that fits into 256\.0 MiB; found a planned peak of .* MiB"
    ):
        check_attacks_fit(config, {attack: batches}, CPU)
    config, batches, _, _ = planned(folder, 1, lora_rank=(1000,))
    with pytest.raises(UserError, match="--lora-rank of at most 512"):
        check_attacks_fit(config, {config.attacks()[0]: batches}, CPU)


def test_the_command_looks_before_it_reads_weights(
    home: Path,
    tmp_path: Path,
    run_here: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An attack that could not fit ran out of memory after it had read the model and claimed its folder."""
    write_wmdp(tmp_path / "data", [question(index, answer=index % 4, said=None) for index in range(4)])
    monkeypatch.setattr("evals.attack_memory.available_gib", lambda device: 1e-6)
    words = ["--model", home / "model", "--corpus", home / "forget.jsonl", "--seq-len", 24, "--examples", 8]
    words += ["--eval-tasks", "wmdp_bio", "--data-dir", tmp_path / "data", "--output", tmp_path / "attack"]
    assert run_here(tamper.main, *words) == 2
    assert "expected an attack that fits into" in capsys.readouterr().err and not (tmp_path / "attack").exists()
