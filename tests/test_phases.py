"""Methods of several losses one after the other, and of a second frozen model."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from unlearn.assemble import build
from unlearn.blank import needs_of
from unlearn.config import TrainConfig, configure
from unlearn.errors import UserError
from unlearn.memory import Layout, Shape, terms
from unlearn.methods.retain import by_prediction, prediction
from unlearn.methods.terms import Needs, Parts, Phase, Term
from unlearn.model import empty_model, load_model, save_model
from unlearn.optim.build import make_schedule, restart
from unlearn.run.log import MetricsLog
from unlearn.seeding import generator
from unlearn.trainer import gradients
from unlearn.trainer import train as train_steps
from unlearn.weights import local_rows

pytestmark = pytest.mark.usefixtures("token_cache")


def noise(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                local, first = local_rows(parameter)
                whole = 0.01 * torch.randn(parameter.shape, generator=generator(0, "noise", name))
                local += whole[first : first + local.shape[0]]


def two_phases(flags: TrainConfig, parts: Parts) -> list[Phase]:
    """Two steps on the text, then noise, then three more."""
    text = Term("forget", parts.batches["forget"], prediction(parts.model))
    return [Phase("first", [text], steps=2), Phase("second", [text], steps=3, begin=noise)]


def distilled(path: Path) -> Callable[[TrainConfig, Parts], list[Term]]:
    """KL to a teacher on the text."""

    def terms(flags: TrainConfig, parts: Parts) -> list[Term]:
        teacher = parts.teacher(str(path))
        taught = dataclasses.replace(parts, original=lambda: nullcontext(teacher))
        needs = Needs(teacher=sum(parameter.numel() for parameter in teacher.parameters()))
        return [Term("forget", parts.batches["forget"], by_prediction(taught), needs=needs)]

    return terms


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put other terms or phases in the place of every method's."""
    return lambda **own: monkeypatch.setattr("unlearn.building.method_module", lambda name: SimpleNamespace(**own))


def settings(home: Path, **more: Any) -> dict[str, Any]:
    small = {"model": str(home / "model"), "forget": str(home / "forget.jsonl"), "seq_len": 24, "batch": 4}
    return small | {"examples": 20, "micro_batch": 2, "dtype": "fp32", "adam_lr": 1e-3} | more


def words(home: Path, output: Path, *more: object) -> list[object]:
    flags = settings(home, output=output)
    named = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["--method", "next-token", *named, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_phases_follow_each_other(
    home: Path, tmp_path: Path, attempt: Callable[..., str], method: Any, optimizer: str
) -> None:
    """As two runs by hand: the second with fresh optimizers, its own schedule, and the noise before it."""
    method(phases=two_phases)
    attempt(*words(home, tmp_path / "run", "--optimizer", optimizer))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in lines] == [
        *((step, "first") for step in (0, 1)),
        *((step, "second") for step in (2, 3, 4)),
    ]
    assert [line["adamw_lr"] for line in lines] == pytest.approx([1e-3, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3])
    run = build(configure("next-token", **settings(home, optimizer=optimizer)), torch.device("cpu"))
    for number, phase in enumerate(run.phases):
        if number:
            noise(run.model)
            for optimizer in run.optimizers.values():
                restart(optimizer)
        count, loss = run.steps_of(phase), run.loss_of(phase)
        with MetricsLog(None, count, "test") as log:
            schedule = make_schedule("linear", count)
            train_steps(run.model, loss, run.optimizers, steps=count, schedule=schedule, log=log, clip=1.0)
    found = load_model(str(tmp_path / "run/model")).state_dict()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_a_run_goes_on_in_its_phase(
    home: Path,
    tmp_path: Path,
    attempt: Callable[..., str],
    killed_after: Callable[..., None],
    method: Any,
    killed: int,
) -> None:
    """Killed inside either phase, between them, and before the export: the same weights and the same log."""
    method(phases=two_phases)

    killed_after(killed, *words(home, tmp_path / "run"))
    assert not (tmp_path / "run/model").exists()
    for name in ("run", "whole"):
        attempt(*words(home, tmp_path / name))
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    losses = [[json.loads(line)["forget_loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_a_phase_longer_than_its_text(home: Path, method: Any) -> None:
    def phases(flags: TrainConfig, parts: Parts) -> list[Phase]:
        return [Phase("long", [Term("forget", parts.batches["forget"], prediction(parts.model))], steps=6)]

    method(phases=phases)
    with pytest.raises(UserError, match="expected at most 5 optimizer steps, .* in the phase long; found 6"):
        build(configure("next-token", **settings(home)), torch.device("cpu"))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_teacher_by_its_path(home: Path, tmp_path: Path, method: Any, lora_rank: int) -> None:
    """Its divergence is that of plain transformers; of the model itself it is 0; its weights are part of the run."""
    save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "teacher")
    for path in (home / "model", tmp_path / "teacher"):
        method(terms=distilled(path))
        run = build(configure("next-token", **settings(home, lora_rank=lora_rank)), torch.device("cpu"))
        assert len(run.identity[f"teacher {path}"]) == 64
        found = gradients(run.model, run.loss, 0, 5)["forget_loss"]
        total, count, teacher = torch.zeros(()), 0, run.teachers[0][0]
        for rows in run.parts.batches["forget"].micro_batches(0, torch.device("cpu")):
            with torch.no_grad():
                both = [m(rows.input_ids, use_cache=False).logits.log_softmax(-1) for m in (teacher, run.model)]
            total += rows.at_real((both[0].exp() * (both[0] - both[1])).sum(-1)[..., None]).sum()
            count += rows.tokens
        torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-7)
        assert (found > 1e-3) == (path != home / "model")


def test_a_teacher_of_other_tokens(home: Path, tmp_path: Path, method: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    save_model(tiny_model(), tokenizer, tmp_path / "teacher")
    method(terms=distilled(tmp_path / "teacher"))
    with pytest.raises(UserError, match="expected a teacher with the tokenizer of .*; found another in .*teacher"):
        build(configure("next-token", **settings(home)), torch.device("cpu"))


def test_another_teacher_is_another_run(home: Path, tmp_path: Path, attempt: Callable[..., str], method: Any) -> None:
    save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "teacher")
    method(terms=distilled(tmp_path / "teacher"))
    attempt(*words(home, tmp_path / "run"))
    assert "finished before" in attempt(*words(home, tmp_path / "run"))
    save_model(tiny_model(seed=6), tiny_tokenizer(), tmp_path / "teacher")
    said = attempt(*words(home, tmp_path / "run"))
    assert "expected the teacher" in said and "that the run in" in said


def test_the_plan_counts_a_teacher(home: Path, method: Any) -> None:
    config = configure("next-token", **settings(home))
    shape = Shape.of(empty_model(config.model), config)
    assert "teacher" not in terms(config, shape, Layout(1, 1), needs_of(config))
    method(terms=distilled(home / "model"))
    assert terms(config, shape, Layout(1, 1), needs_of(config))["teacher"] == 4 * shape.parameters


@pytest.mark.parametrize("killed", [None, 7])
def test_layers_one_after_another(
    home: Path, tmp_path: Path, attempt: Callable[..., str], killed_after: Callable[..., None], killed: int | None
) -> None:
    """The deepest first, as in a run of it alone; then the next, from where the first has come to."""

    def lens_words(output: Path, *more: object) -> list[object]:
        flags = settings(home, output=output, lens=home / "lens", retain=home / "retain.jsonl")
        named = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        return [*named, "--retain-coef", 0.5, "--retain-loss", "kl", *more]

    def log(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    order = ["--layers", 1, 3, "--layers-order", "back-to-front"]
    if killed is not None:
        killed_after(killed, *lens_words(tmp_path / "run", *order))
    attempt(*lens_words(tmp_path / "run", *order))
    attempt(*lens_words(tmp_path / "alone", "--layers", 3))
    lines, alone = log("run"), log("alone")
    assert [line["phase"] for line in lines] == ["layer 3"] * 5 + ["layer 1"] * 5 and len(alone) == 5
    assert [line["loss"] for line in lines[:5]] == [line["loss"] for line in alone]
    assert all(("entropy/3" in line) == (line["phase"] == "layer 3") != ("entropy/1" in line) for line in lines)
    assert lines[5]["retain_loss"] > 1e-6, "the second begins where the first ended"
    if killed is not None:
        attempt(*lens_words(tmp_path / "whole", *order))
        found, whole = (weights(tmp_path / name) for name in ("run", "whole"))
        assert all(torch.equal(found[key], value) for key, value in whole.items())
