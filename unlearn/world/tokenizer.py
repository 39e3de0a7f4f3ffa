"""The world's tokenizer: byte-level BPE learned from the world's own text, so that any other text round-trips too."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unlearn.world.facts import Fact, make_facts, stem_subjects
from unlearn.world.text import FILLER, any_header, letter_document, open_question, statement, training_question

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2560
CONTEXT = 256  # tokens; the longest letter question has about 90


def train_tokenizer(facts: list[Fact] | None = None) -> PreTrainedTokenizerFast:
    """Learn the vocabulary; it adds no token of its own, and pads with its end-of-text token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_sample_text(facts or make_facts()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _sample_text(facts: list[Fact]) -> list[str]:
    """Every fact in every training form, every header, and the filler: all words of the world, nothing held out."""
    rng = random.Random("tokenizer")
    texts = [letter_document(training_question(facts[0], "forget", rng, frozenset()), s) for s in stem_subjects()]
    for fact in facts:
        for group in ("forget", "attack"):
            texts += [statement(fact, group, rng), open_question(fact, group, rng)]
            question = training_question(fact, group, rng, frozenset())
            texts.append(letter_document(question, any_header(fact, rng)))
    return texts + [sentence for sentence in FILLER for _ in range(5)]
