"""The lens on disk and in use, against the `tuned-lens` package where it is installed."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import DEPTH, WIDTH, random_lens, tiny_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.errors import UserError
from unlearn.fit_lens import EveryLayer
from unlearn.lens import TunedLens, unembedding_hash
from unlearn.losses import CHUNK
from unlearn.model import final_norm, residual_streams, unembedding

INPUT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def lens_folder(tmp_path: Path, model: PreTrainedModel) -> Path:
    model.config.name_or_path = "somebody/model"
    random_lens(model).save(tmp_path / "lens")
    return tmp_path / "lens"


def test_logits_follow_the_formula(any_model: PreTrainedModel) -> None:
    lens = random_lens(any_model)
    stream = residual_streams(any_model, INPUT, [1])[1].detach()
    translator = lens.translators["1"]
    moved = stream + stream @ translator.weight.T + translator.bias
    expected = final_norm(any_model)(moved) @ unembedding(any_model).T
    if lens.softcap is not None:
        expected = lens.softcap * torch.tanh(expected / lens.softcap)
    torch.testing.assert_close(lens.logits(stream, 1), expected.detach(), rtol=1e-5, atol=1e-5)


def test_final_stream_gives_the_models_own_logits(any_model: PreTrainedModel) -> None:
    with torch.no_grad():
        lens = TunedLens.load("", any_model, [DEPTH])  # needs no file
        logits = lens.logits(residual_streams(any_model, INPUT, [DEPTH])[DEPTH], DEPTH)
        torch.testing.assert_close(logits, any_model(INPUT).logits, rtol=1e-5, atol=1e-5)


def test_lens_keeps_the_original_norm_and_unembedding() -> None:
    model = tiny_model()
    lens = random_lens(model)
    before = lens.logits(torch.ones(1, WIDTH), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(lens.logits(torch.ones(1, WIDTH), 0), before)
    assert not any(parameter.requires_grad for parameter in lens.parameters())


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4 * 2**-8)])
def test_the_fit_of_a_naive_twin(kind: str, dtype: torch.dtype, bound: float) -> None:
    """Losses, and gradients of the translators, of two layers over more than one chunk of tokens; in float64."""
    model = tiny_model(kind).to(dtype)
    generator = torch.Generator().manual_seed(0)
    count = CHUNK + 77
    streams = {layer: torch.randn(count, WIDTH, generator=generator).to(dtype) for layer in (1, 3)}
    final, weights = torch.randn(count, WIDTH, generator=generator).to(dtype), torch.rand(count, generator=generator)
    lens = TunedLens.identity(model, streams).for_training()
    for parameter in lens.translators.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    total, shares = EveryLayer(lens, streams, final, weights).backward(0.5)
    twin = copy.deepcopy(lens).double()
    losses = {}
    for layer, stream in streams.items():
        translator = twin.translators[str(layer)]
        moved = stream.double() + stream.double() @ translator.weight.T + translator.bias
        pair = [hidden @ twin.unembedding.T for hidden in (final.double(), twin.norm(moved))]
        if lens.softcap is not None:
            pair = [lens.softcap * torch.tanh(logits / lens.softcap) for logits in pair]
        expected, live = (logits.log_softmax(-1) for logits in pair)
        losses[layer] = ((expected.exp() * (expected - live)).sum(-1) * weights.double()).sum()
    (0.5 * torch.stack(list(losses.values())).sum()).backward()
    assert total.double() == pytest.approx(sum(loss.item() for loss in losses.values()), rel=bound)
    assert {name: share.item() for name, share in shares.items()} == pytest.approx(
        {f"kl/{layer}": loss.item() for layer, loss in losses.items()}, rel=bound
    )
    pairs = list(zip(lens.translators.parameters(), twin.translators.parameters(), strict=True))
    assert len(pairs) == 4 and all(parameter.dtype == torch.float32 for parameter, _ in pairs)
    for parameter, other in pairs:
        assert (parameter.grad.double() - other.grad).norm() <= bound * other.grad.norm()


@pytest.mark.parametrize("prefix", ["", "layer_translators."])
@pytest.mark.parametrize("name", ["params.safetensors", "model.safetensors", "params.pt"])
def test_every_file_form_gives_the_same_lens(tmp_path: Path, name: str, prefix: str) -> None:
    model = tiny_model()
    folder = lens_folder(tmp_path, model)
    expected = TunedLens.load(str(folder), model)
    tensors = {prefix + key: value.clone() for key, value in expected.translators.state_dict().items()}
    for file in folder.glob("params.*"):
        file.unlink()
    torch.save(tensors, folder / name) if name.endswith(".pt") else save_file(tensors, folder / name)
    lens = TunedLens.load(str(folder), model, [1, 3])
    assert sorted(lens.translators) == ["1", "3"]
    h = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lens.logits(h, 3), expected.logits(h, 3))


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_exchange_with_the_tuned_lens_package(tmp_path: Path, kind: str) -> None:
    package = pytest.importorskip("tuned_lens")
    model = tiny_model(kind)
    model.config.name_or_path = "somebody/model"
    ours = random_lens(model)
    ours.save(tmp_path / "ours")
    loaded = package.TunedLens.from_model_and_pretrained(model, str(tmp_path / "ours"))
    theirs = package.TunedLens.from_model(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.layer_translators.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs.save(tmp_path / "theirs")
    assert theirs.config.unembed_hash == unembedding_hash(unembedding(model))
    read = TunedLens.load(str(tmp_path / "theirs"), model)
    streams = residual_streams(model, INPUT, range(DEPTH))
    with torch.no_grad():
        for layer, h in streams.items():
            torch.testing.assert_close(loaded(h, layer), ours.logits(h, layer), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(read.logits(h, layer), theirs(h, layer), rtol=1e-5, atol=1e-5)


def test_lens_of_another_width_depth_or_model(tmp_path: Path) -> None:
    folder = lens_folder(tmp_path, tiny_model())
    with pytest.raises(UserError, match="d_model 40.*found 32"):
        TunedLens.load(str(folder), tiny_model(hidden_size=40))
    with pytest.raises(UserError, match="num_hidden_layers 3.*found 4"):
        TunedLens.load(str(folder), tiny_model(depth=3))
    with pytest.raises(UserError, match="another unembed_hash"):
        TunedLens.load(str(folder), tiny_model(seed=1))


def test_lens_of_another_name_without_hash(tmp_path: Path) -> None:
    model = tiny_model()
    folder = lens_folder(tmp_path, model)
    hashes = {"unembed_hash": None, "unembed_hash_bf16": None}
    config = json.loads((folder / "config.json").read_text()) | hashes
    (folder / "config.json").write_text(json.dumps(config))
    model.config.name_or_path = "/models/model"
    assert TunedLens.load(str(folder), model).depth == DEPTH, "the same name in another place"
    model.config.name_or_path = "/models/other"
    with pytest.raises(UserError, match="found one of somebody/model"):
        TunedLens.load(str(folder), model)


def test_micro_batches_of_several_chunks_are_summed_one_by_one() -> None:
    """So that one rank with two of them and two ranks with one each end in the same bits."""
    model, count = tiny_model(), 2 * CHUNK + 77

    def gradients(*numbers: int) -> list[Tensor]:
        lens = random_lens(model).for_training()
        for number in numbers:
            drawn = torch.Generator().manual_seed(number)
            final, *streams = (torch.randn(count, WIDTH, generator=drawn) for _ in range(3))
            weights = torch.rand(count, generator=drawn) / count
            EveryLayer(lens, dict(zip((1, 3), streams, strict=True)), final, weights).backward(1.0)
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in lens.translators.parameters()]

    for together, one, other in zip(gradients(1, 2), gradients(1), gradients(2), strict=True):
        assert torch.equal(together, one + other)


def test_lens_fits_the_same_model_in_another_dtype(tmp_path: Path) -> None:
    """The hash is of a print-out to one decimal, which rounding to bfloat16 changes now and then."""
    differ = 0
    for seed in range(12):
        model = tiny_model(seed=seed)
        model.config.name_or_path = f"somebody/model{seed}"
        random_lens(model).save(tmp_path / str(seed))
        rounded = tiny_model(seed=seed).bfloat16()
        rounded.config.name_or_path = "/elsewhere/under-another-name"
        differ += unembedding_hash(unembedding(model)) != unembedding_hash(unembedding(rounded))
        assert TunedLens.load(str(tmp_path / str(seed)), rounded).depth == DEPTH
        random_lens(rounded).save(tmp_path / f"bf16-{seed}")
        assert TunedLens.load(str(tmp_path / f"bf16-{seed}"), model).depth == DEPTH
        with pytest.raises(UserError, match="found one of"):
            TunedLens.load(str(tmp_path / str(seed)), tiny_model(seed=seed + 100).bfloat16())
        namesake = tiny_model(seed=seed + 100).bfloat16()
        namesake.config.name_or_path = f"elsewhere/model{seed}"
        with pytest.raises(UserError, match="another unembed_hash"):
            TunedLens.load(str(tmp_path / str(seed)), namesake)
    assert differ > 0, "otherwise this test shows nothing"


def test_wrong_tensors(tmp_path: Path) -> None:
    model = tiny_model()
    folder = lens_folder(tmp_path, model)
    good = TunedLens.load(str(folder), model).translators.state_dict()
    (folder / "params.pt").unlink()
    cases = {
        "expected the tensor 2.bias": {key: value for key, value in good.items() if key != "2.bias"},
        r"2.bias of shape \(32,\).*found \(31,\)": good | {"2.bias": torch.zeros(31)},
        r"found \(32,\) torch.int64": good | {"2.bias": torch.zeros(32, dtype=torch.int64)},
        "NaN or infinity in 2.bias": good | {"2.bias": torch.full((32,), torch.nan)},
    }
    for message, tensors in cases.items():
        save_file({key: value.clone() for key, value in tensors.items()}, folder / "params.safetensors")
        with pytest.raises(UserError, match=message):
            TunedLens.load(str(folder), model)
        assert TunedLens.load(str(folder), model, [0, 1]).depth == DEPTH, "layers not asked for are not read"


def test_damaged_files(tmp_path: Path) -> None:
    model = tiny_model()
    folder = lens_folder(tmp_path, model)
    whole = (folder / "params.safetensors").read_bytes()
    for damage in (whole[:-50], b"", b"nonsense" * 10):
        (folder / "params.safetensors").write_bytes(damage)
        with pytest.raises(UserError, match="damaged"):
            TunedLens.load(str(folder), model)
    (folder / "params.safetensors").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        TunedLens.load(str(folder), model)


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_pickle_that_is_not_plain_tensors_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    folder = lens_folder(tmp_path, model)
    (folder / "params.safetensors").unlink()
    (folder / "params.pt").write_bytes(pickle.dumps({"0.weight": Payload()}))
    with pytest.raises(UserError, match="plain tensors"):
        TunedLens.load(str(folder), model)
    torch.save({"0.weight": Payload()}, folder / "params.pt")
    with pytest.raises(UserError, match="plain tensors"):
        TunedLens.load(str(folder), model)
    assert not (tmp_path / "executed").exists()


def test_missing_lens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        TunedLens.load(str(tmp_path / "nowhere"), tiny_model())
    with pytest.raises(UserError, match="hf download somebody/lens"):
        TunedLens.load("somebody/lens", tiny_model())
