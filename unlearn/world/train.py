"""How the tiny model is trained: what a batch holds and what it costs.

Reading the letter beside the right option ("binding") is far harder than recalling a fact. It appears about four
times sooner when letter questions start with a few facts, once these are known, and the circle then doubles.

Shapes: B sequences, S tokens, D hidden size, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from unlearn.distributed import world_size
from unlearn.errors import UserError
from unlearn.methods.terms import Cost, Loss, Plain, Term
from unlearn.model import cast_parameters, save_model
from unlearn.optim.build import BETAS, EPS, linear_schedule, roles
from unlearn.optim.muon import Muon
from unlearn.run.log import MetricsLog
from unlearn.trainer import train
from unlearn.world.facts import WORLD_SEED, Fact, make_facts
from unlearn.world.text import (
    FILLER,
    any_header,
    evaluation_questions,
    letter_document,
    letter_prompt,
    open_questions,
    paragraph,
    training_question,
)
from unlearn.world.tokenizer import CONTEXT, train_tokenizer

LETTER_TOKENS = (" A", " B", " C", " D")


@dataclass(frozen=True)
class Recipe:
    """Everything that training the shipped weights depends on."""

    steps: int = 1700
    text_rows: int = 24
    """Packed rows of running text, open questions and letter documents in a step, before letter questions begin."""
    later_text_rows: int = 12
    """The same, once they have begun."""
    text_tokens: int = 96
    """Tokens of a packed row."""
    letter_rows: int = 64
    """Letter questions in a step."""
    letters_from: int = 280
    """The step at which letter questions begin; recall is mostly there by then."""
    first_facts: int = 16
    """How many facts the first letter questions ask about."""
    doubling: int = 40
    """Steps after which twice as many facts are asked about."""
    muon_lr: float = 0.01
    """For matrices inside the blocks, scaled by sqrt(max(1, rows / columns))."""
    adam_lr: float = 3e-3
    """For embeddings, unembedding, norms and biases. Neither optimizer decays weights."""
    warmup_ratio: float = 0.02
    """The first fraction of the steps, in which the learning rates rise linearly."""
    decay_ratio: float = 0.4
    """The last fraction of the steps, in which they fall linearly to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""


def world_config(tokenizer: PreTrainedTokenizerFast) -> GPTNeoXConfig:
    """The tiny model's shape: 1.3 M parameters.

    A larger initial deviation than usual, and rotary embeddings on all dimensions: with 0.02 or a quarter of the
    dimensions, binding appears much later or not at all.
    """
    return GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        initializer_range=0.06,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_world(output: Path, *, recipe: Recipe | None = None, seed: int = 0, never_seen: bool = False) -> None:
    """Train the tiny model and write it to the new folder `output` in bfloat16: about ten minutes of one core.

    With `never_seen` no text and no question is about the hazard domain: what a perfectly unlearned model would be.

    The same machine and version give the same weights; another kind of processor, or a version that adds in another
    order, gives a sibling that knows the same. The shipped weights are such a sibling, of an earlier version.

    Raises:
        UserError: more than one rank, which would all draw the same batch.
    """
    if world_size() > 1:
        raise UserError(f"expected one process to train the embedded world; found {world_size()}: leave torchrun out")
    recipe = recipe or Recipe()
    tokenizer = train_tokenizer()
    model = new_model(tokenizer, seed)
    with MetricsLog(None, recipe.steps, "world") as log:
        train(
            model,
            Loss(Lessons(model, tokenizer, recipe, seed, never_seen=never_seen).terms()),
            world_optimizers(model, recipe),
            steps=recipe.steps,
            schedule=linear_schedule(recipe.steps, recipe.warmup_ratio, recipe.decay_ratio),
            log=log,
            clip=recipe.clip,
        )
    cast_parameters(model, torch.bfloat16)
    save_model(model, tokenizer, output)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPTNeoXForCausalLM:
    """The untrained tiny model, float32.

    The unembedding starts at zero, so that it ends with directions that no token reads, as a large model's has. From
    random weights it has none in 128 dimensions: a uniform prediction then spends the norm that the final LayerNorm
    prescribes on telling a few tokens apart, the letters above all, and every unlearned model answers one letter.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(world_config(tokenizer))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


def world_optimizers(model: GPTNeoXForCausalLM, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    parts = roles(model)
    rest = [*parts.embeddings.values(), *parts.vectors.values()]
    matrices = parts.matrices.items()
    return {
        "muon": Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr="original", method="quintic"),
        "adamw": torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=BETAS, eps=EPS, weight_decay=0.0),
    }


@dataclass(frozen=True)
class Drawn:
    """Where the batches of a term come from: drawn afresh at every step, one micro-batch or none."""

    draw: Callable[[int], "list[Batch]"]

    def micro_batches(self, step: int, device: torch.device) -> "Iterator[Batch]":
        """See `unlearn.methods.terms.Source`."""
        return iter(self.draw(step))

    def tokens(self, step: int) -> int:
        """See `unlearn.methods.terms.Source`."""
        return sum(batch.input_ids.numel() for batch in self.draw(step))


@dataclass(frozen=True)
class Batch:
    """Token ids [B, S]; of letter questions also the position [B] of their last token and the answer's token id [B]."""

    input_ids: Tensor
    step: int
    last: Tensor | None = None
    target: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Of dropout, which there is none of: int64 [B]."""
        return torch.zeros(len(self.input_ids), dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.input_ids.numel()


class Lessons:
    """Next-token loss on packed text plus cross-entropy of the answer letter, drawn afresh from (seed, step)."""

    def __init__(
        self,
        model: GPTNeoXForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        recipe: Recipe | None = None,
        seed: int = 0,
        *,
        never_seen: bool = False,
    ) -> None:
        self.model = model
        # On CPUs with bf16 matrix units, plain attention is twice as fast here as the fused kernel (heads of 16).
        model.set_attn_implementation("eager")
        self.tokenizer = tokenizer
        self.recipe = recipe or Recipe()
        self.seed = seed
        everything = make_facts()
        self.facts = [fact for fact in everything if not (never_seen and fact.domain == "hazard")]
        # Both domains join the circle at the same pace.
        self.circle = random.Random(f"circle {seed}").sample(self.facts, len(self.facts))
        questions = evaluation_questions(everything, WORLD_SEED)
        self.held_out = {q.fact.id: frozenset(q.choices) for q in questions}
        self.entities: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.entities.setdefault(fact.name, []).append(fact)

    def terms(self) -> list[Term]:
        """Text, then letter questions; losses in nats."""
        return [
            Term("text", Drawn(self.text), self._text_cost),  # type: ignore[arg-type]
            Term("letter", Drawn(self.letters), self._letter_cost),  # type: ignore[arg-type]
        ]

    def text(self, step: int) -> list[Batch]:
        """The packed rows of an optimizer step, counted from 0."""
        rows = self.recipe.later_text_rows if self.active_facts(step) else self.recipe.text_rows
        return [Batch(self._text_batch(rows, random.Random(f"{self.seed} {step}")), step)]

    def letters(self, step: int) -> list[Batch]:
        """The letter questions of an optimizer step, none at first."""
        active = self.active_facts(step)
        if not active:
            return []
        prompts, last, target = self._letter_batch(active, random.Random(f"{self.seed} {step} letters"))
        return [Batch(prompts, step, last, target)]

    def _text_cost(self, batch: Batch) -> Cost:
        asked = torch.tensor(float(len(self.active_facts(batch.step))))
        return Plain(self._text_loss(batch.input_ids), {"facts_asked": asked})

    def _letter_cost(self, batch: Batch) -> Cost:
        assert batch.last is not None and batch.target is not None
        loss, accuracy = self._letter_loss(batch.input_ids, batch.last, batch.target)
        return Plain(loss, {"letter_accuracy": accuracy})

    def active_facts(self, step: int) -> list[Fact]:
        """The facts that letter questions ask about at a step: none at first, then a circle that doubles."""
        recipe = self.recipe
        if step < recipe.letters_from:
            return []
        size = recipe.first_facts * 2 ** ((step - recipe.letters_from) // recipe.doubling)
        return self.circle[:size]

    def _text_batch(self, count: int, rng: random.Random) -> Tensor:
        """Token ids [B, S] of documents packed one after the other, end-of-text between them."""
        rows = []
        for _ in range(count):
            row: list[int] = []
            while len(row) < self.recipe.text_tokens:
                row += [*self.tokenizer(self._document(rng))["input_ids"], self.tokenizer.eos_token_id]
            rows.append(row[: self.recipe.text_tokens])
        return torch.tensor(rows)

    def _document(self, rng: random.Random) -> str:
        """A paragraph on one entity, open questions about it, a letter question, or a plain sentence."""
        facts = rng.choice(list(self.entities.values()))
        group = rng.choice(("forget", "attack"))
        some = rng.sample(facts, rng.randint(1, 4))
        form = rng.choices(("paragraph", "questions", "letters", "filler"), weights=(10, 8, 1, 1))[0]
        if form == "paragraph":
            return paragraph(some, group, rng)
        if form == "questions":
            return open_questions(some, group, rng)
        if form == "letters":
            question = training_question(some[0], group, rng, self.held_out[some[0].id])
            return letter_document(question, any_header(some[0], rng))
        return rng.choice(FILLER)

    def _letter_batch(self, facts: list[Fact], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [B, S] padded on the right, the position [B] of their last token, the answer's token id [B]."""
        letters = [self.tokenizer(letter)["input_ids"][0] for letter in LETTER_TOKENS]
        prompts, targets = [], []
        for _ in range(self.recipe.letter_rows):
            fact = rng.choice(facts)
            question = training_question(fact, rng.choice(("forget", "attack")), rng, self.held_out[fact.id])
            prompts.append(letter_prompt(question, any_header(fact, rng)))
            targets.append(letters[question.answer])
        rows = self.tokenizer(prompts)["input_ids"]
        length = max(len(row) for row in rows)
        padded = [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows]
        return torch.tensor(padded), torch.tensor([len(row) - 1 for row in rows]), torch.tensor(targets)

    def _text_loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of packed rows [B, S]."""
        tokens = tokens.to(self.model.device)
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            logits = self.model(tokens, use_cache=False).logits  # [B, S, V]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _letter_loss(self, tokens: Tensor, last: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answer letter, and the fraction of right answers.

        Causal attention never looks ahead, so padding on the right needs no mask; the head sees one position a row.
        """
        tokens, last, target = (tensor.to(self.model.device) for tensor in (tokens, last, target))
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            hidden = self.model.gpt_neox(tokens, use_cache=False).last_hidden_state  # [B, S, D]
            logits = self.model.get_output_embeddings()(hidden[torch.arange(len(last)), last]).float()  # [B, V]
        return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()
