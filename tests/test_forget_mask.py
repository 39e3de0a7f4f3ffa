"""--forget-mask: which tokens of forget text count."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_tokenizer
from test_output_methods import in_double
from test_phases import settings

from unlearn.assemble import Unlearning, build
from unlearn.config import configure
from unlearn.corpus import Corpus, read_corpus
from unlearn.errors import UserError
from unlearn.fit_config import FitLensConfig
from unlearn.forget_mask import token_masks
from unlearn.methods.terms import Loss
from unlearn.trainer import gradients

pytestmark = pytest.mark.usefixtures("token_cache")
CPU = torch.device("cpu")
WORD = WORDS[1]


@pytest.mark.parametrize("context", [0, 2])
def test_tokens_of_a_match_and_around_it(context: int) -> None:
    """As found by decoding, token after token."""
    tokenizer, text = tiny_tokenizer(), f"{WORDS[0]} {WORD} {WORDS[2]} {WORDS[3]}, {WORD}"
    (mask,) = token_masks([text], tokenizer, WORD, context, "text")
    ids, place, touched = tokenizer(text)["input_ids"], 0, []
    for number, token in enumerate(ids):
        piece = tokenizer.decode([token])
        if any(
            place < match.end() and place + len(piece) > match.start() + piece.startswith(" ")
            for match in re.finditer(WORD, text)
        ):
            touched.append(number)
        place += len(piece)
    expected = np.zeros(len(ids), dtype=bool)
    for number in touched:
        expected[max(0, number - context) : number + context + 1] = True
    assert mask.tolist() == expected.tolist() and 0 < mask.sum() < len(mask)
    assert [one.tolist() for one in token_masks(["", "x"], tokenizer, WORD, 0, "text")] == [[], [False]]


def test_windows_keep_their_part_of_the_mask(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, source = tiny_tokenizer(), str(home / "forget.jsonl")
    whole, masked = (read_corpus(source, tokenizer, seq_len=24, mask=mask) for mask in (None, WORD))
    assert masked.masks is not None and len(masked.masks) == len(masked.windows) < len(whole.windows)
    assert all(len(mask) == len(window) for mask, window in zip(masked.masks, masked.windows, strict=True))
    assert all(mask[1:].any() for mask in masked.masks)
    kept = [window.tolist() for window in masked.windows]
    for window in whole.windows:
        found = WORD in tokenizer.decode(window[1:])
        assert not found or window.tolist() in kept
    counted = sum(int(mask.sum()) for mask in masked.masks)
    assert f"--forget-mask keeps {counted:,} of the " in capsys.readouterr().out
    assert masked.sha256() != Corpus(masked.name, masked.documents, masked.windows).sha256()


def assembled(home: Path, method: str, **flags: Any) -> Unlearning:
    named = settings(home, retain=str(home / "retain.jsonl"), forget_mask=WORD, forget_context=1, examples=11, **flags)
    return build(configure(method, **named), CPU)


def test_losses_count_the_masked_tokens_alone(home: Path) -> None:
    """RMU's mean is over them; gradient ascent's over those that are to be predicted; of the whole global batch."""
    run = assembled(home, "grad-diff")
    batches, model = run.parts.batches["forget"], in_double(run.model)
    assert batches.corpus.masks is not None
    losses = []
    for index in batches.indices(2):
        ids, mask = torch.tensor(batches.corpus.windows[index]).long(), torch.tensor(batches.corpus.masks[index])
        nll = -model(ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        losses.append(nll[mask[1:]])
    forget = Loss([run.phases[0].terms[0]])
    found = gradients(run.model, forget, 2, 3)
    torch.testing.assert_close(found["forget_loss"].double(), torch.cat(losses).mean().detach(), rtol=1e-5, atol=1e-6)
    assert found["tokens"] == batches.tokens(2) > batches.counted(2) > batches.targets(2) - 1


@pytest.mark.parametrize("method", ["rmu", "npo", "max-entropy"])
def test_accumulation_changes_nothing(home: Path, method: str) -> None:
    found = []
    for size in (1, 4):
        run = assembled(home, method, micro_batch=size, **({"layers": (2,)} if method == "rmu" else {}))
        gradients(run.model, run.loss, 2, 3)
        found.append({name: parameter.grad for name, parameter in run.model.named_parameters()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_another_mask_is_another_run(home: Path, tmp_path: Path, attempt: Callable[..., str]) -> None:
    named = settings(home, retain=str(home / "retain.jsonl"), output=tmp_path / "run", examples=11)
    words = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert "--forget-mask keeps" in attempt("--method", "wga", *words, "--forget-mask", WORD)
    said = attempt("--method", "wga", *words, "--forget-mask", WORDS[2])
    assert "forget_mask" in said or "--forget-mask" in said
    assert json.loads((tmp_path / "run/config.json").read_text())["forget_mask"] == WORD


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nowhere": ({"forget_mask": "zebra"}, "expected --forget-mask to be found in .*; found 'zebra' nowhere"),
    "no expression": ({"forget_mask": "("}, "expected --forget-mask to be a regular expression"),
    "context alone": ({"forget_mask": None}, "--forget-context has no effect without --forget-mask"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(home: Path, name: str) -> None:
    flags, said = MISTAKES[name]
    named = settings(home, retain=str(home / "retain.jsonl"), forget_context=1) | flags
    with pytest.raises(UserError, match=said):
        build(configure("grad-diff", **named), CPU)


def test_a_lens_is_fitted_to_all_text() -> None:
    """It shares the flags of corpora; this one would have no effect."""
    assert "forget_mask" not in {field.name for field in dataclasses.fields(FitLensConfig)}


def test_a_tokenizer_that_knows_no_places() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="expected a tokenizer that says where its tokens lie"):
        token_masks(["a"], Slow(), "a", 0, "text")  # type: ignore[arg-type]
