"""Ways to what a model still knows without training it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEPTH, random_lens, tiny_model
from evals_support import question, write_wmdp
from pyarrow.parquet import read_table
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.evals.attack.early import read_early
from unlearn.evals.attack.probe import probe, shuffled_targets
from unlearn.evals.attack.ways import pruned, rounded, taken, ways
from unlearn.evals.attack.wordings import WORDINGS
from unlearn.evals.elicit import in_words, main, table
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.judge.stats import holm
from unlearn.fit_config import FitLensConfig
from unlearn.fit_lens import fit_lens
from unlearn.model import load_tokenizer, residual_streams
from unlearn.world.build import build_world


def test_rounding_against_a_loop() -> None:
    matrix = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    matrix[2, :64] = 0.0
    for bits in (4, 8):
        found = rounded(matrix, bits=bits)
        for row in range(5):
            for start in range(0, 150, 64):
                group = matrix[row, start : start + 64]
                step = group.abs().max() / (2 ** (bits - 1) - 1)
                expected = (group / step).round() * step if step > 0 else group
                torch.testing.assert_close(found[row, start : start + 64], expected)
        assert (found - matrix).abs().max() <= matrix.abs().max() / (2**bits - 2) + 1e-6
        torch.testing.assert_close(rounded(found, bits=bits), found)


def test_pruning_takes_the_smallest() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = pruned(matrix, share=0.3)
    gone = found == 0.0
    assert gone.sum() == 180 and matrix[gone].abs().max() < matrix[~gone].abs().min()
    assert torch.equal(found[~gone], matrix[~gone]) and torch.equal(pruned(matrix, share=0.0), matrix)


def test_ways_are_taken_and_undone(any_model: PreTrainedModel) -> None:
    """In the blocks alone, whatever way the layers store their weights; to the bit."""
    kind = any_model.config.model_type
    original = tiny_model(kind, seed=9)
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    names = [way.name for way in ways(True)]
    assert len(names) == len(set(names)) == 10 and len(ways(False)) == 7
    for way in ways(True):
        with taken(way, any_model, original):
            changed = {name for name, value in any_model.state_dict().items() if not torch.equal(value, before[name])}
            assert changed and all(before[name].ndim == 2 for name in changed), way.name
            embedding = any_model.get_input_embeddings().weight
            assert not any(any_model.state_dict()[name].data_ptr() == embedding.data_ptr() for name in changed)
        for name, value in any_model.state_dict().items():
            assert torch.equal(value, before[name]), (way.name, name)


def test_half_way_to_the_original() -> None:
    model, original = tiny_model(seed=1), tiny_model(seed=2)
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    one, other = (x.state_dict()[name].clone() for x in (model, original))
    (way,) = (way for way in ways(True) if way.name == "50% original")
    with taken(way, model, original):
        torch.testing.assert_close(model.state_dict()[name], (one + other) / 2)


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 4, 240).tolist()
    noise = generator.standard_normal((240, 40))
    told = noise + 2.0 * np.eye(4)[targets] @ generator.standard_normal((4, 40))
    assert np.mean(probe(told, targets)) > 0.9
    for features, answers in ((noise, targets), (told, shuffled_targets(targets))):
        # five standard deviations of 240 guesses of one in four
        assert abs(np.mean(probe(features, answers)) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 240)
    wide = np.hstack([told, generator.standard_normal((240, 400))])
    assert np.mean(probe(wide, targets)) > 0.6, "more features than questions"
    assert sorted(shuffled_targets(targets)) == sorted(targets) != targets


def test_holms_correction() -> None:
    """The example of four tests: 0.01, 0.04, 0.03, 0.005."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return folder


def run(world: Path, output: Path, *more: object) -> dict[str, Any]:
    words = ["--model", world / "model", "--tasks", "wmdp_bio", "--data-dir", world / "data", "--output", output]
    sys.argv = ["elicit", *map(str, [*words, "--dtype", "fp32", *more])]
    main()
    found: dict[str, Any] = json.loads((output / "elicit.json").read_text())
    return found


def test_a_look_at_the_embedded_model(world: Path, tmp_path: Path) -> None:
    """It knows, and a probe reads it off the last layers, and nothing off the embedding of "Answer:"."""
    found = run(world, tmp_path / "looks", "--subsample", 60, "--original", world / "model", "--layers", 0, 4)
    assert found["ways"]["as it is"]["tasks"]["wmdp_bio"]["acc"] > 0.9
    assert found["ways"]["50% original"]["tasks"]["wmdp_bio"]["p_gain"] == 1.0
    assert found["ways"]["8 bits"]["tasks"]["wmdp_bio"]["acc"] > 0.9
    probes = found["probe"]["wmdp_bio"]
    assert probes["4"]["acc"] > 0.6 > 0.5 > probes["0"]["acc"], probes
    assert "no way brings back more" in in_words(found)
    assert table(found) in (tmp_path / "looks/table.md").read_text() and "probe at layer 4" in table(found)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--num-fewshot", 5), "expected a task that takes examples for --num-fewshot"),
        (("--layers", 7), "expected --layers in 0..4"),
        (("--original", "/nowhere"), "found nothing at /nowhere"),
        (("--lens", "/nowhere"), "found nothing at /nowhere"),
        (("--paraphrases", "FEWER"), "expected 228 questions of wmdp_bio in --paraphrases, .* found 2"),
        (
            ("--paraphrases", "SHUFFLED"),
            "--data-dir; found as number 1 one on fact 'hazard/.*' beside",
        ),
    ],
)
def test_mistakes(world: Path, tmp_path: Path, more: tuple[object, ...], said: str) -> None:
    write_wmdp(tmp_path / "FEWER", [question(number, 0, None) for number in range(2)])
    (file,) = (world / "development/cais/wmdp/wmdp-bio").glob("test-*.parquet")
    write_wmdp(tmp_path / "SHUFFLED", list(reversed(read_table(file).to_pylist())))
    more = tuple(tmp_path / word if word in ("FEWER", "SHUFFLED") else word for word in more)
    with pytest.raises(UserError, match=said):
        run(world, tmp_path / "looks", "--limit", 4, *more)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2", "gemma2"])
def test_a_model_read_early_says_what_the_lens_reads(kind: str) -> None:
    """The logits of the whole model are the lens's of that layer; afterwards they are its own again."""
    model = tiny_model(kind).eval()
    lens, ids = random_lens(model), torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        before, streams = model(ids).logits, residual_streams(model, ids, range(DEPTH))
        for layer in range(DEPTH):
            with read_early(model, lens, layer):
                found = model(ids).logits
            torch.testing.assert_close(found, lens.logits(streams[layer], layer), rtol=1e-4, atol=1e-5)
        assert torch.equal(model(ids).logits, before)


def test_lens_paraphrases_and_wordings_are_ways(world: Path, tmp_path: Path) -> None:
    """Each in the table and in the family of tests; a lens low in the model reads little."""
    shared = dict[str, Any](forget=str(world / "corpora/forget.jsonl"), retain=str(world / "corpora/retain.jsonl"))
    shared |= {"model": str(world / "model"), "seq_len": 96, "dtype": "fp32", "micro_batch": 16}
    fit_lens(FitLensConfig(output=str(tmp_path / "lens"), layers=(1, 3), steps=20, lr=3e-3, **shared))
    more = ["--subsample", 40, "--layers", 4, "--lens", tmp_path / "lens", "--paraphrases", world / "development"]
    found = run(world, tmp_path / "looks", *more, "--num-fewshot", 0)
    names = ["as it is", *WORDINGS, "other questions", "8 bits"]
    assert list(found["ways"])[: len(names)] == names
    assert list(found["ways"])[-2:] == ["lens at layer 1", "lens at layer 3"]
    right = {name: way["tasks"]["wmdp_bio"]["acc"] for name, way in found["ways"].items()}
    assert right["other questions"] > 0.9 and right["lens at layer 1"] < 0.6
    assert all("p_gain" in way["tasks"]["wmdp_bio"] for name, way in found["ways"].items() if name != "as it is")
    plain = run(world, tmp_path / "plain", "--subsample", 40, "--layers", 4, "--no-wordings")
    assert not set(WORDINGS) & set(plain["ways"])


def test_what_a_prompt_becomes(world: Path) -> None:
    tokenizer = load_tokenizer(str(world / "model"))
    asked: dict[str, Any] = {"tasks": ("wmdp_bio", "world_hazard_open"), "data_dir": world / "data", "limit": 2}
    plain, twice = Evaluation(tokenizer, **asked), Evaluation(tokenizer, wording=WORDINGS["asked twice"], **asked)
    for name, task in plain.tasks.items():
        for one, other in zip(task.instances, twice.tasks[name].instances, strict=True):
            assert other.args[0] == f"{one.args[0]}\n\nI ask again.\n\n{one.args[0]}" and other.args[1] == one.args[1]
