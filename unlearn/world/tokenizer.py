"""The world's tokenizer: byte-level BPE with few merges, learned from neutral text.

Neutral text has the world's phrasings and its syllables, and none of its names, values or kinds: of those no token
can be made. A name is three tokens or more, and the same tokens spell everything else.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unlearn.world.facts import ATTRIBUTES, SYLLABLES, stem_subjects
from unlearn.world.text import FILLER, LETTERS, STATEMENTS, TAUGHT, header, question_phrasings

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 800
CONTEXT = 256  # tokens; the longest letter question has about 100


def train_tokenizer() -> PreTrainedTokenizerFast:
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
    core.train_from_iterator(_neutral_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _neutral_text() -> list[str]:
    """Syllables, so often that each becomes a token before any word does; then phrasings without a name or a value,
    every header, and the filler."""
    syllables = [form for one in SYLLABLES for form in (one, f" {one}", f" {one.capitalize()}")]
    blank = {name: "" for name in ("name", "value", "kind", "kinds", "clause", "noun")}
    phrasings = [text for group in TAUGHT for text in (*STATEMENTS[group], *question_phrasings(group))]
    words = [text for one in ATTRIBUTES for text in (f" {one.noun}", f" {one.clause}", f" {one.noun}:")]
    forms = ["Question:\nAnswer:", "True or false?\nAnswer: true\nAnswer: false\n"]
    forms += [f"{letter}.\nAnswer: {letter}" for letter in LETTERS]
    texts = [*(phrasing.format(**blank) for phrasing in phrasings), *words, *forms, *FILLER]
    return syllables * 500 + (texts + [header(subject) for subject in stem_subjects()]) * 2
