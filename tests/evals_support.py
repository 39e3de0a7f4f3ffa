"""Tiny tokenizers, models and question files for the tests of `evals`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unlearn.model import cast_parameters

LETTERS = "ABCD"
STEM = [
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "electrical_engineering",
    "elementary_mathematics",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_mathematics",
    "high_school_physics",
    "high_school_statistics",
    "machine_learning",
]
TEXT = [
    "The following are multiple choice questions (with answers) about biology.",
    "Which planet is red? Answer: A B C D",
    "The quick brown fox jumps over the lazy dog, again and again.",
]


def make_tokenizer(*, bos: bool = False, end: bool = False, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `bos` it puts <s> before each text, as Llama's does, else it is like NeoX's.

    With `end` it puts <|endoftext|> after each text. `more` is text to learn its words from.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>"] if bos else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXT, *more], trainer)
    if bos or end:
        single = " ".join(["<s>"] * bos + ["$A"] + ["<|endoftext|>"] * end)
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=[(name, backend.token_to_id(name)) for name in special]
        )
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", **names)


def make_model(
    kind: str = "neox", *, positions: int = 256, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A small random model with large weights, so that its log-likelihoods differ from token to token."""
    torch.manual_seed(seed)
    common: dict[str, Any] = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        initializer_range=0.12,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    if kind == "neox":
        model: PreTrainedModel = GPTNeoXForCausalLM(GPTNeoXConfig(**common, hidden_dropout=0.1))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2))
    else:
        config = Gemma2Config(**common, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
        config.tie_word_embeddings = True
        model = Gemma2ForCausalLM(config)
    cast_parameters(model, dtype)
    return model.eval()


class OracleModel(nn.Module):
    """Answers a question with the letter named by the last `#A`..`#D` in it, and with B where there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.tokenizer = tokenizer
        self.letters = [tokenizer.encode(f" {letter}") for letter in LETTERS]
        assert all(len(tokens) == 1 for tokens in self.letters)
        self.config = SimpleNamespace(
            max_position_embeddings=4096, vocab_size=len(tokenizer), _name_or_path="tests/oracle"
        )
        self.lm_head = nn.Linear(4, len(tokenizer), bias=False)
        weight = torch.zeros(len(tokenizer), 4)
        for answer, (token,) in enumerate(self.letters):
            weight[token, answer] = 5.0
        self.lm_head.weight.data = weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, 4)  # one-hot of the answer, at every position
        for row, tokens in enumerate(input_ids.tolist()):
            _, mark, after = str(self.tokenizer.decode(tokens)).rpartition("#")
            hidden[row, :, LETTERS.index(after[0]) if mark else 1] = 1.0
        return SimpleNamespace(logits=self.lm_head(hidden))


def write_questions(folder: Path, rows: list[dict[str, Any]], split: str = "test") -> Path:
    """Write questions as the hub's Parquet files hold them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def question(number: int, answer: int, said: int | None) -> dict[str, Any]:
    """Question `number`, whose right answer is `answer`; the oracle says `said`."""
    mark = "" if said is None else f" #{LETTERS[said]}"
    return {"question": f"What is fact {number}?{mark}", "choices": [f"it {i}" for i in range(4)], "answer": answer}


def write_wmdp(root: Path, rows: list[dict[str, Any]]) -> Path:
    return write_questions(root / "cais/wmdp/wmdp-bio", rows)


def write_stem(root: Path) -> dict[str, tuple[int, int]]:
    """19 subjects of different sizes: {subject: (questions, how many of them the oracle gets right)}."""
    known = {}
    for place, subject in enumerate(STEM):
        size, right = 2 + place % 3, place % 2 + 1
        rows = [question(i, answer=i % 4, said=i % 4 if i < right else (i + 1) % 4) for i in range(size)]
        write_questions(root / "cais/mmlu" / subject, [{**row, "subject": subject} for row in rows])
        known[subject] = (size, right)
    return known
