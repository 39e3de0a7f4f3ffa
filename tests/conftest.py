"""Fixtures: tiny random models from their configuration, a tiny tokenizer, tiny corpora. Nothing touches a network."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, below

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import train  # noqa: E402
from unlearn.errors import run_command  # noqa: E402
from unlearn.lens import TunedLens  # noqa: E402
from unlearn.model import LAYOUTS, save_model  # noqa: E402
from unlearn.run.checkpoint import Checkpoints  # noqa: E402

VOCABULARY = 301  # prime: divisible by nothing
DEPTH, WIDTH = 4, 32
WORDS = "amber basalt cobalt dolomite ember flint garnet halite iron jasper kaolin lapis".split()
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 8009,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
}


def tiny_model(kind: str = "gpt_neox", seed: int = 0, depth: int = DEPTH, **overrides: object) -> PreTrainedModel:
    """A random float32 model of an architecture of the table: 4 blocks, hidden 32, vocabulary 301."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    if kind == "gpt_neox":
        sizes |= {"rotary_pct": 0.5}
    if kind in ("gpt_neox", "gpt2"):
        del sizes["num_key_value_heads"], sizes["head_dim"]
    if kind == "gpt2":
        sizes |= {"n_inner": sizes.pop("intermediate_size")}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(sizes | overrides))).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder that holds nothing but config.json."""
    path = tmp_path_factory.mktemp("neox")
    (path / "config.json").write_text(json.dumps(NEOX))
    return str(path)


def hide_gpus(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session", autouse=True)
def hidden_gpus() -> Iterator[pytest.MonkeyPatch]:
    """Ranks are forked from the tests' process and speak gloo: only tests marked gpu, which undo this, see a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        hide_gpus(patch)
        yield patch


@pytest.fixture(params=sorted(LAYOUTS))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One tiny model of every architecture of the table."""
    return tiny_model(request.param)


def _text(rng: random.Random, words: list[str], longest: int = 60) -> str:
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, longest)))


def write_corpus(path: Path, words: list[str], documents: int = 30, seed: int = 0) -> Path:
    """A JSONL corpus of random words, documents of different lengths."""
    rng = random.Random(seed)
    path.write_text("".join(json.dumps({"text": _text(rng, words)}) + "\n" for _ in range(documents)))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `tiny_tokenizer`."""
    return tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 301 tokens that adds no special tokens; " A" to " D" are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_text(random.Random(0), WORDS, 2000), " A B C D" * 1000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with model/, lens/, forget.jsonl and retain.jsonl, to run the commands on; never written to."""
    return write_home(tmp_path_factory.mktemp("home"), tokenizer)


def write_home(root: Path, tokenizer: PreTrainedTokenizerFast, kind: str = "gpt_neox") -> Path:
    """Fill a folder with what `home` says."""
    model = tiny_model(kind)
    model.config.name_or_path = str(root / "model")
    save_model(model, tokenizer, root / "model")
    random_lens(model).save(root / "lens")
    assert TunedLens.load(str(root / "lens"), model).depth == DEPTH
    write_corpus(root / "forget.jsonl", WORDS[:6], seed=1)
    write_corpus(root / "retain.jsonl", WORDS[6:], seed=2)
    return root


def random_lens(model: PreTrainedModel, seed: int = 0) -> TunedLens:
    """A lens with small random translators."""
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (0.05 * torch.randn(width, width, generator=generator), 0.05 * torch.randn(width, generator=generator))
        for _ in range(model.config.num_hidden_layers)
    ]
    return TunedLens(model, dict(enumerate(pairs)))


@pytest.fixture
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of tokenised corpora of this test's own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command within this process, which saves importing torch again; return its exit code."""

    def run(main: Callable[[], None], *words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        try:
            run_command("command", main)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def killed_after(run_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run train.py within this process until the checkpoint after so many steps is whole."""

    def run(step: int, *words: object) -> None:
        def after(self: Checkpoints, done: int) -> None:
            self.save(done)
            if done == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "after", after)
            assert run_here(train.main, *words) == 130

    return run


@pytest.fixture
def attempt(run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run train.py within this process; return what it says: its error sentence, or else its output."""

    def train_here(*words: object) -> str:
        code = run_here(train.main, *words)
        said = capsys.readouterr()
        if code == 0:
            return said.out + said.err
        assert code == 2
        (line,) = [line for line in said.err.splitlines() if "command: error: " in line]
        return line

    return train_here
