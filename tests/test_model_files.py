"""Which files of a folder are the model, and what is refused: the oracle is plain transformers."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_lens, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from unlearn.corpus_texts import read_texts
from unlearn.errors import UserError
from unlearn.lens import TunedLens
from unlearn.lens_readings import encode_prompts
from unlearn.lora import add_lora, save_adapter
from unlearn.model import empty_model, load_config, load_model, load_tokenizer, save_model
from unlearn.model_config import check_windows
from unlearn.model_files import Checkpoint

INPUT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
Change = Callable[[dict[str, torch.Tensor]], None]


def saved(folder: Path, kind: str = "llama", **overrides: object) -> Path:
    save_model(tiny_model(kind, **overrides), tiny_tokenizer(), folder)
    return folder


def rewrite(folder: Path, change: Change, name: str = "model.safetensors", to: str | None = None) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / (to or name), metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


def same_as_transformers(folder: Path) -> PreTrainedModel:
    """Our model of a folder, once it is sure that transformers makes the same of it."""
    ours, theirs = load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(ours), logits(theirs.eval()))
    return ours


def zeroed(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = torch.zeros_like(tensors[name])


def test_other_safetensors_in_the_folder_are_not_the_model(tmp_path: Path) -> None:
    """An average or an optimizer's file that sorted later replaced every tensor of the model, without a word."""
    folder = saved(tmp_path)
    rewrite(folder, zeroed, to="old.safetensors")
    assert logits(same_as_transformers(folder)).any()


def test_the_single_file_comes_before_an_index(tmp_path: Path) -> None:
    """A stale index beside model.safetensors won, where transformers reads the single file."""
    folder = saved(tmp_path)
    rewrite(folder, zeroed, to="model-00001-of-00001.safetensors")
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert logits(same_as_transformers(folder)).any()


def test_an_interrupted_download_of_a_tied_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache had the index and not all that it names: an error, before the download that would have gone on."""
    cached = tmp_path / "models--somebody--tied"
    folder = saved(cached / "snapshots/abc", tie_word_embeddings=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    whole, shard = folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"
    names = load_file(whole)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    whole.rename(tmp_path / shard.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert Checkpoint.at_hand("somebody/tied") is None
    with pytest.raises(UserError, match=f"expected the file {shard.name} in .*abc, as its index says"):
        Checkpoint.at_hand(str(folder))  # nobody will complete a local folder
    (tmp_path / shard.name).rename(shard)
    found = Checkpoint.at_hand("somebody/tied")
    assert found is not None and found.paths() == [shard]


def test_files_that_are_damaged_between_two_looks(tmp_path: Path) -> None:
    """Comparing the two matrices of a tied model ended in a traceback where a file was cut short meanwhile."""

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(saved(tmp_path, tie_word_embeddings=True), twice)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.same("lm_head.weight", "model.embed_tokens.weight")
    for content in (b"junk", None):
        (tmp_path / "model.safetensors").unlink()
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="expected a readable model in"):
            checkpoint.same("lm_head.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_matrices_under_a_tied_flag_are_two(tmp_path: Path, kind: str) -> None:
    """The stored unembedding was thrown away for the embedding: another model was measured, trained and exported."""

    def another_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.randn(301, 32, generator=torch.Generator().manual_seed(1))

    folder = saved(tmp_path / "model", kind, tie_word_embeddings=True)
    tied = logits(load_model(str(folder)))
    rewrite(folder, another_head)
    model = same_as_transformers(folder)
    assert not torch.equal(logits(model), tied)
    save_model(model, tiny_tokenizer(), tmp_path / "export")
    assert torch.equal(logits(same_as_transformers(tmp_path / "export")), logits(model))


@pytest.mark.parametrize("kept", ["both", "head"])
def test_a_tied_matrix_stored_twice_or_as_the_head(tmp_path: Path, kept: str) -> None:
    """Which of its two names a tied matrix is stored under makes no difference to transformers."""

    def under_another_name(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept == "head":
            del tensors["model.embed_tokens.weight"]

    rewrite(saved(tmp_path, tie_word_embeddings=True), under_another_name)
    model = same_as_transformers(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_numbers_that_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """Quantised weights were read as if their raw numbers were the weights."""

    def quantised(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)

    rewrite(saved(tmp_path), quantised)
    with pytest.raises(UserError, match=r"found model.layers.1.mlp.up_proj.weight in \S+, as in a quantised model"):
        load_model(str(tmp_path))


def test_a_quantised_configuration(tmp_path: Path) -> None:
    """Plain weights under a quantization_config were exported with it, and no longer loaded in transformers."""
    configure(saved(tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"found a quantization_config \(gptq\)"):
        empty_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_tensors_that_the_model_has_no_place_for(tmp_path: Path, kind: str) -> None:
    """With fewer layers in config.json than in the files, the rest of the model was left out without a word."""
    configure(saved(tmp_path, kind), num_hidden_layers=3)
    with pytest.raises(UserError, match=r"found \d+ more \(\S+layers.3"):
        load_model(str(tmp_path))


def test_buffers_of_older_checkpoints_are_no_surplus(tmp_path: Path) -> None:
    def older(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            place = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{place}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
            tensors[f"{place}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{place}.rotary_emb.inv_freq"] = torch.ones(2)

    rewrite(saved(tmp_path, "gpt_neox"), older)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("index", ["[]", "3", '{"weight_map": {"a": 3}}', '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (saved(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="expected a weight_map from tensors to files"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 7},
        {"num_attention_heads": 0},
        {"hidden_act": "foo"},
        {"dtype": "foo"},
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
        {"vocab_size": None},
        {"vocab_size": -3},
        {"num_hidden_layers": "4"},
    ],
)
def test_a_configuration_that_makes_no_model(tmp_path: Path, changes: dict[str, object]) -> None:
    """Whatever transformers raises for it reached the user as a traceback."""
    configure(saved(tmp_path, "gpt_neox"), **changes)
    with pytest.raises(UserError, match="expected a config.json of which transformers can make a model"):
        empty_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", "junk", '{"added_tokens": [], "model": {"type": "Foo"}}'])
def test_a_damaged_tokenizer(tmp_path: Path, content: str) -> None:
    (saved(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="expected a readable tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama", "gemma"])
def test_no_tokenizer_files(tmp_path: Path, kind: str) -> None:
    """transformers makes an empty tokenizer, under which every corpus is empty: the corpus was then blamed."""
    for file in saved(tmp_path, kind).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="expected tokenizer files"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    """Its last tokens had no row in the embedding: an IndexError in the first step, after the folder was claimed."""
    saved(tmp_path, vocab_size=250)
    with pytest.raises(UserError, match="expected a tokenizer of at most 250 tokens .* of number 300"):
        load_tokenizer(str(tmp_path))


def test_added_tokens_without_a_row(tmp_path: Path) -> None:
    """Sound models whose tokenizer has added or special tokens that no text comes to were refused: Gemma 3's image
    token, CodeLlama's infilling tokens, Llama 2 with a <pad>."""
    folder = saved(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    config = load_config(str(folder))
    assert sorted(tokenizer.get_added_vocab().values())[-2:] == [301, 302] and config.vocab_size == 301
    windows = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in ("some words", "an <image>")]
    check_windows(config, {"a.jsonl": windows[:1]})
    with pytest.raises(UserError, match=r"expected tokens below 301, .* found the token 301 in b.jsonl: take it"):
        check_windows(config, {"a.jsonl": windows[:1], "b.jsonl": windows})
    encode_prompts(tokenizer, ["some words"], config)
    with pytest.raises(UserError, match="found the token 302 in --prompts"):
        encode_prompts(tokenizer, ["words <pad>"], config)


def test_windows_longer_than_the_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 under the default --seq-len was an IndexError; rotary models read past what they were made for, unsaid."""
    learned, computed = (load_config(str(saved(tmp_path / kind, kind))) for kind in ("gpt2", "llama"))
    windows = {"a.jsonl": [range(128)], "b.jsonl": [range(5), range(129)]}
    check_windows(learned, {"a.jsonl": windows["a.jsonl"]})
    with pytest.raises(UserError, match=r"at most 128 tokens.*one of 129 in b.jsonl: give --seq-len 128"):
        check_windows(learned, windows)
    assert capsys.readouterr().out == ""
    check_windows(computed, windows)
    assert (
        "warning: the model was made for texts of 128 tokens, and b.jsonl has windows of 129" in capsys.readouterr().out
    )


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that others may reach, read from by another user than the one who runs the tests, where root may."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    try:
        yield folder
    finally:
        if user == 0:
            os.seteuid(0)
        for place in (folder, *filter(Path.is_dir, folder.iterdir())):
            place.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_users_files(name: str) -> None:
    """Files that may not be read were called damaged, or missing, or ended in a traceback."""
    with as_nobody() as place:
        folder = saved(place / "model")
        for file in folder.iterdir():
            file.chmod(0o000 if file.name == name else 0o644)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match=f"that may be read at .*{name}; found 'Permission denied'"):
            load_model(str(folder))


@pytest.mark.parametrize("name", ["x.jsonl", "x", "x/y.jsonl"])
def test_another_users_corpus(name: str) -> None:
    with as_nobody() as place:
        (place / name).parent.mkdir(exist_ok=True)
        if name == "x":
            (place / name).mkdir()
        else:
            (place / name).write_text('{"text": "words"}')
        (place / ("x" if "/" in name else name)).chmod(0o000)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match="that may be read at .*; found 'Permission denied'"):
            read_texts(str(place / name))


def test_a_pointer_of_git_lfs_in_place_of_the_weights(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (saved(tmp_path) / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="found a Git LFS pointer"):
        load_model(str(tmp_path))


def test_exports_have_the_rights_that_the_umask_leaves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """safetensors writes files for their owner alone: colleagues of a group could not load a model."""
    before = os.umask(0o002)
    try:
        model = tiny_model("llama")
        save_model(model, tokenizer, tmp_path / "model")
        random_lens(model).save(tmp_path / "lens")
        add_lora(model, 2, 4.0)
        save_adapter(model, tmp_path / "adapter", "base")
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.rglob("*.*")}
    assert len(modes) >= 8 and set(modes.values()) == {"0o664"}, modes


def test_a_full_disk_while_the_tokenizer_is_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizers library reports it as a bare Exception, which reached the user as a traceback."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(UserError, match="expected to write the tokenizer .*No space left"):
        save_model(tiny_model(), tokenizer, tmp_path)


def test_a_lens_whose_hash_is_a_list(tmp_path: Path) -> None:
    model = tiny_model()
    random_lens(model).save(tmp_path)
    configure(tmp_path, unembed_hash=[1, 2])
    with pytest.raises(UserError, match="expected unembed_hash in .* to be text"):
        TunedLens.load(str(tmp_path), model)
