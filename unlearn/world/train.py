"""How the tiny model is trained: what a batch holds and what it costs.

Reading the letter beside the right option ("binding") is far harder than recalling a fact. It appears when all forms
are about a few facts first, and stays when the circle widens slowly. Where it doubled instead, binding was lost again.

Shapes: B sequences, S tokens, D hidden size, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

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
from unlearn.world.facts import WORLD_SEED, Fact, make_facts, unrelated_facts
from unlearn.world.text import (
    FILLER,
    LETTERS,
    TAUGHT,
    VERDICTS,
    any_header,
    claim,
    claim_document,
    claim_prompt,
    held_out_options,
    letter_document,
    letter_prompt,
    open_questions,
    paragraph,
    training_question,
)
from unlearn.world.tokenizer import CONTEXT, train_tokenizer

Knows = Literal["model", "never-seen", "matched"]
MODELS: tuple[Knows, ...] = get_args(Knows)


@dataclass(frozen=True)
class Recipe:
    """Everything that training the shipped weights depends on."""

    steps: int = 2600
    text_rows: int = 8
    """Packed rows of running text, open questions and answered questions in a step."""
    text_tokens: int = 96
    """Tokens of a packed row."""
    text_weight: float = 3.0
    """Of the loss on text; most of its tokens say nothing of a fact."""
    letter_rows: int = 40
    """Letter questions in a step."""
    claim_rows: int = 32
    """Claims in a step."""
    first_facts: int = 16
    """How many facts the first steps are about."""
    widen_from: int = 200
    """The step from which they are about more and more; reading a letter beside the right option is there by then."""
    widen_to: int = 1200
    """The step from which they are about all."""
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
    """The tiny model's shape: 1.0 M parameters.

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


def train_world(output: Path, *, knows: Knows = "model", recipe: Recipe | None = None, seed: int = 0) -> None:
    """Train the tiny model and write it to the new folder `output` in bfloat16: about 20 minutes of one core.

    Args:
        knows: `model`, the hazard domain and the general one; `never-seen`, the general domain alone, which is what a
            perfectly unlearned model would know; `matched`, the general one and as many facts about other microbes,
            which in an attack learns the hazard domain as fast as a model that knows the forms of its questions can.

    The same machine and version give the same weights; another kind of processor, or a version that adds in another
    order, gives a sibling that knows the same.

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
            Loss(Lessons(model, tokenizer, known_facts(knows), recipe, seed).terms()),
            world_optimizers(model, recipe),
            steps=recipe.steps,
            schedule=linear_schedule(recipe.steps, recipe.warmup_ratio, recipe.decay_ratio),
            log=log,
            clip=recipe.clip,
        )
    cast_parameters(model, torch.bfloat16)
    save_model(model, tokenizer, output)


def known_facts(knows: Knows) -> list[Fact]:
    """What a model of the world is taught."""
    everything = make_facts()
    general = [fact for fact in everything if fact.domain == "general"]
    return {"model": everything, "never-seen": general, "matched": [*unrelated_facts(), *general]}[knows]


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
        "muon": Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr="original"),
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
    """Next-token loss on packed text plus cross-entropy of the answers to letter questions and claims, drawn afresh
    from (seed, step).

    Every form is about the same facts at every step, few at first: neither is learnt before another.
    """

    def __init__(
        self,
        model: GPTNeoXForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        facts: list[Fact],
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.seed = model, tokenizer, recipe, seed
        # Plain attention is faster here than the fused kernel (heads of 16).
        model.set_attn_implementation("eager")
        # All domains join the circle at the same pace.
        self.circle = random.Random(f"circle {seed}").sample(facts, len(facts))
        self.held_out = held_out_options(make_facts(), WORLD_SEED)

    def terms(self) -> list[Term]:
        """Text, letter questions, claims; losses in nats."""
        return [
            Term("text", Drawn(self.text), self._text_cost, lambda s: self.recipe.text_weight),  # type: ignore[arg-type]
            Term("letter", Drawn(self.letters), partial(self._answer_cost, "letter")),  # type: ignore[arg-type]
            Term("claim", Drawn(self.claims), partial(self._answer_cost, "claim")),  # type: ignore[arg-type]
        ]

    def text(self, step: int) -> list[Batch]:
        """The packed rows of an optimizer step, counted from 0."""
        facts, rng = self.active_facts(step), random.Random(f"{self.seed} {step}")
        entities: dict[str, list[Fact]] = {}
        for fact in facts:
            entities.setdefault(fact.name, []).append(fact)
        return [Batch(self._text_batch(list(entities.values()), rng), step)]

    def letters(self, step: int) -> list[Batch]:
        """The letter questions of an optimizer step."""
        facts, rng = self.active_facts(step), random.Random(f"{self.seed} {step} letters")
        asked = []
        for fact in rng.choices(facts, k=self.recipe.letter_rows):
            question = training_question(fact, rng.choice(TAUGHT), rng, self.held_out.get(fact.id, frozenset()))
            asked.append((letter_prompt(question, any_header(fact, rng)), LETTERS[question.answer]))
        return [self._answer_batch(asked, step)]

    def claims(self, step: int) -> list[Batch]:
        """The claims of an optimizer step."""
        facts, rng = self.active_facts(step), random.Random(f"{self.seed} {step} claims")
        asked = []
        for fact in rng.choices(facts, k=self.recipe.claim_rows):
            one = claim(fact, rng.choice(TAUGHT), rng, rng.randrange(2))
            asked.append((claim_prompt(one), VERDICTS[one.answer]))
        return [self._answer_batch(asked, step)]

    def _text_cost(self, batch: Batch) -> Cost:
        asked = torch.tensor(float(len(self.active_facts(batch.step))))
        return Plain(self._text_loss(batch.input_ids), {"facts_asked": asked})

    def _answer_cost(self, form: str, batch: Batch) -> Cost:
        assert batch.last is not None and batch.target is not None
        loss, accuracy = self._answer_loss(batch.input_ids, batch.last, batch.target)
        return Plain(loss, {f"{form}_accuracy": accuracy})

    def active_facts(self, step: int) -> list[Fact]:
        """The facts that a step is about: few, then evenly more, then all."""
        recipe = self.recipe
        share = (step - recipe.widen_from) / (recipe.widen_to - recipe.widen_from)
        more = round((len(self.circle) - recipe.first_facts) * min(1.0, max(0.0, share)))
        return self.circle[: recipe.first_facts + more]

    def _text_batch(self, entities: list[list[Fact]], rng: random.Random) -> Tensor:
        """Token ids [B, S] of documents packed one after the other, end-of-text between them."""
        rows = []
        for _ in range(self.recipe.text_rows):
            row: list[int] = []
            while len(row) < self.recipe.text_tokens:
                row += [*self.tokenizer(self._document(entities, rng))["input_ids"], self.tokenizer.eos_token_id]
            rows.append(row[: self.recipe.text_tokens])
        return torch.tensor(rows)

    def _document(self, entities: list[list[Fact]], rng: random.Random) -> str:
        """A paragraph on one entity, open questions about it, a letter question, a claim, or a plain sentence."""
        facts = rng.choice(entities)
        group = rng.choice(TAUGHT)
        some = rng.sample(facts, rng.randint(1, min(4, len(facts))))
        form = rng.choices(("paragraph", "questions", "letters", "claim", "filler"), weights=(10, 10, 1, 1, 1))[0]
        if form == "paragraph":
            return paragraph(some, group, rng)
        if form == "questions":
            return open_questions(some, group, rng)
        if form == "letters":
            question = training_question(some[0], group, rng, self.held_out.get(some[0].id, frozenset()))
            return letter_document(question, any_header(some[0], rng))
        if form == "claim":
            return claim_document(claim(some[0], group, rng, rng.randrange(2)))
        return rng.choice(FILLER)

    def _answer_batch(self, asked: list[tuple[str, str]], step: int) -> Batch:
        """Prompts [B, S] padded on the right, the position [B] of their last token, the answer's token id [B]."""
        rows = self.tokenizer([prompt for prompt, _ in asked])["input_ids"]
        targets = [self.tokenizer(f" {answer}")["input_ids"][0] for _, answer in asked]
        length = max(len(row) for row in rows)
        padded = [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows]
        last = torch.tensor([len(row) - 1 for row in rows])
        return Batch(torch.tensor(padded), step, last, torch.tensor(targets))

    def _text_loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of packed rows [B, S]."""
        tokens = tokens.to(self.model.device)
        logits = self.model(tokens, use_cache=False).logits  # [B, S, V]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _answer_loss(self, tokens: Tensor, last: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answer, and the fraction of right answers.

        Causal attention never looks ahead, so padding on the right needs no mask; the head sees one position a row.
        """
        tokens, last, target = (tensor.to(self.model.device) for tensor in (tokens, last, target))
        hidden = self.model.gpt_neox(tokens, use_cache=False).last_hidden_state  # [B, S, D]
        logits = self.model.get_output_embeddings()(hidden[torch.arange(len(last)), last]).float()  # [B, V]
        return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()
