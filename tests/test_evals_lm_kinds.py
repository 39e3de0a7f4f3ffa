"""Perplexities and generation of `harness.lm` against lm-eval's HFLM, and the shortcuts of `harness.encode`."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evals_support import make_model, make_tokenizer, write_questions, write_stem
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.harness.encode import encode_pairs
from unlearn.evals.harness.lm import LiveModel
from unlearn.evals.harness.requests import SCORED_POSITIONS, make_plan

TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again. " * 5,
    "Which planet is red?",
    "x",
    "<|endoftext|>The fox",
    "Answer: A B C D " * 9,
]


def requests(arguments: list[Any]) -> list[Any]:
    return [SimpleNamespace(args=one, task_name="test") for one in arguments]


def hflm(model: Any, tokenizer: Any, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, **options)


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("positions", [256, 24, 7])
def test_rolling_log_likelihoods_equal_hflm(positions: int, bos: bool) -> None:
    tokenizer, model = make_tokenizer(bos=bos), make_model("llama", positions=positions)
    asked = requests([(text,) for text in TEXTS])
    expected = hflm(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    found = LiveModel(model, tokenizer, batch_tokens=100).loglikelihood_rolling(asked, disable_tqdm=True)
    # relative: HFLM adds hundreds of float32 numbers in float32
    assert found == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_text_is_that_of_its_plain_logits() -> None:
    tokenizer, model = make_tokenizer(), make_model("neox")
    (found,) = LiveModel(model, tokenizer).loglikelihood_rolling(requests([(TEXTS[1],)]), disable_tqdm=True)
    ids = [tokenizer.eos_token_id, *tokenizer.encode(TEXTS[1])]
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert found == pytest.approx(sum(table[i, token].item() for i, token in enumerate(ids[1:])), rel=1e-6)


GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    ("The quick brown", {"until": ["\n"], "max_gen_toks": 12}),
    ("Which planet is red? Answer:", {"until": ["fox", "q"], "max_gen_toks": 12}),
    ("The", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}),
    ("over the lazy dog " * 20, {"until": [], "max_gen_toks": 12, "temperature": 0.0}),
    ("again and", {"max_gen_toks": 12, "until": "e"}),
    ("x", {"until": ["\n"], "max_gen_toks": 12}),
]


@pytest.mark.parametrize("positions", [256, 40], ids=["whole", "truncated"])
@pytest.mark.parametrize("kind", ["neox", "llama", "gemma2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_texts_equal_hflm(kind: str, positions: int, seed: int) -> None:
    tokenizer, model = make_tokenizer(), make_model(kind, positions=positions, seed=seed)
    tokenizer.pad_token = tokenizer.eos_token
    expected = hflm(model, tokenizer).generate_until(requests(GENERATIONS), disable_tqdm=True)
    lm = LiveModel(model, tokenizer, batch_tokens=100, truncate=True)
    found = lm.generate_until(requests(GENERATIONS), disable_tqdm=True)
    assert found == expected and len(set(found)) > 2
    assert (lm.truncated_contexts > 0) == (positions == 40)
    if positions == 40:
        with pytest.raises(UserError, match="of at most 28 tokens.* found 82.* with --truncate"):
            LiveModel(model, tokenizer).generate_until(requests(GENERATIONS), disable_tqdm=True)


def test_generation_stops_at_the_end_token_and_leaves_flags() -> None:
    tokenizer, model = make_tokenizer(), make_model("neox")
    model.get_output_embeddings().weight.data.zero_()  # every logit ties: the first token, <|endoftext|>, is written
    model.train()
    state = torch.get_rng_state()
    texts = LiveModel(model, tokenizer).generate_until(requests(GENERATIONS), disable_tqdm=True)
    assert texts == [""] * len(GENERATIONS)
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "greedily; found do_sample=True"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 256}, "max_gen_toks from 1 to below 256"),
    ],
)
def test_other_generation_is_refused(settings: dict[str, Any], message: str) -> None:
    live = LiveModel(make_model("neox"), make_tokenizer())
    with pytest.raises(UserError, match=message):
        live.generate_until(requests([("The", {"until": ["\n"]} | settings)]), disable_tqdm=True)


def test_wikitext_perplexity_of_the_whole_task_equals_hflm(tmp_path: Path) -> None:
    """lm-eval's own task on retain text, from a local file."""
    from lm_eval.evaluator import evaluate

    from unlearn.evals.harness.task_loader import load_tasks

    pages = [{"page": " = Fox = \n\n The quick brown fox @-@ jumps over the lazy dog . \n" * n} for n in (1, 4)]
    write_questions(tmp_path / "EleutherAI/wikitext_document_level/wikitext-2-raw-v1", pages)
    tokenizer, model = make_tokenizer(), make_model("neox", positions=64)
    result = Evaluation(tokenizer, tasks=["wikitext"], data_dir=tmp_path).run(model)
    tasks = load_tasks(["wikitext"], data_dir=tmp_path)
    reference = evaluate(hflm(model, tokenizer), tasks, bootstrap_iters=0)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        mine, theirs = (found["results"]["wikitext"][f"{metric},none"] for found in (result, reference))
        assert math.isfinite(mine) and mine == pytest.approx(theirs, rel=1e-5)
    assert "wikitext" not in result["unlearn"]["summary"], "a perplexity is no accuracy"


def test_mixed_kinds_in_one_evaluation(tmp_path: Path) -> None:
    (tmp_path / "write.yaml").write_text(
        "task: write\ndataset_path: own/text\ndataset_name: null\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\nnum_fewshot: 0\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list:\n"
        "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1}\n"
    )
    (tmp_path / "last.yaml").write_text(
        "task: last\ndataset_path: own/text\ndataset_name: null\ntest_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: ' {{answer}}'\nnum_fewshot: 0\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1}\n"
    )
    rows = [{"question": f"The quick brown {i}", "answer": "fox"} for i in range(5)]
    write_questions(tmp_path / "own/text", rows)
    write_stem(tmp_path)
    tasks = ["write", "last", "mmlu_anatomy"]
    evaluation = Evaluation(make_tokenizer(), tasks=tasks, data_dir=tmp_path, include_path=tmp_path)
    model = make_model("neox")
    result = evaluation.run(model)
    assert set(tasks) <= set(result["unlearn"]["summary"])
    assert result["unlearn"]["summary"]["write"]["metric"] == "exact_match"
    again = evaluation.run(model)
    assert again["samples"] == result["samples"], "the second run sees none of the first one's responses"


def plain(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Every string encoded for itself, as lm-eval does."""
    found = []
    for context, continuation in pairs:
        start = tokenizer.encode(context)
        found.append((start, tokenizer.encode(context + continuation)[len(start) :]))
    return found


def make_merging_tokenizer() -> PreTrainedTokenizerFast:
    """No pre-tokenizer: merges run across words, ": A" can be one token, as in some SentencePiece vocabularies."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "_")
    backend.decoder = decoders.Replace("_", " ")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<|endoftext|>"], show_progress=False)
    text = [
        "Answer: A\n",
        "Answer: B\n",
        "fox\nAnswer: C",
        "Answer:",
        "? Answer: A",
        "abcdefghijklmnopqrstuvwxyz0123456789",
    ]
    backend.train_from_iterator(text * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", ["bytes", "bytes-bos", "merging"])
def test_shared_continuations_are_encoded_as_each_for_itself(kind: str) -> None:
    tokenizer = make_merging_tokenizer() if kind == "merging" else make_tokenizer(bos=kind == "bytes-bos")
    contexts = [f"fox {i} {'b' * (i % 5)}{end}" for i in range(40) for end in ("\nAnswer:", "? Answer:", "\nA")]
    pairs = [(context, f" {letter} fox") for context in contexts for letter in "ABC"]
    expected = plain(tokenizer, pairs)
    assert encode_pairs(tokenizer, pairs) == expected
    crosses = [
        tokenizer.encode(c + m)[: len(start)] != start for (c, m), (start, _) in zip(pairs, expected, strict=True)
    ]
    assert any(crosses) == (kind == "merging"), "this one writes its context's last token otherwise"


def test_batches_keep_to_the_scored_positions() -> None:
    pairs = [([1], list(range(2, 1502))) for _ in range(3)] + [([1, i], [3] * 1000) for i in range(5)]
    plan = make_plan(pairs, max_length=2048, batch_tokens=10**6)
    scored = [sum(row.scored for row in batch) for batch in plan.batches]
    assert len(scored) > 1 and max(scored) <= SCORED_POSITIONS
    assert list(map(len, plan.continuations)) == [1500] * 3 + [1000] * 5


def test_whole_tasks_score_exactly_as_with_hflm(tmp_path: Path) -> None:
    """Every accuracy equal, every log-likelihood within 1e-5, on letters, robust letters and full answers."""
    from lm_eval.evaluator import evaluate

    from unlearn.evals.harness.task_loader import load_tasks

    words = "fox dog lazy planet red over again quick brown".split()
    rows = [
        {
            "question": f"Which {words[i % 9]} is {words[i * 5 % 7]} {i}?",
            "choices": [f"{words[(i * 7 + j * 2) % 9]} {words[(i + j) % 9]}"[: 4 + (i + 3 * j) % 9] for j in range(4)],
            "answer": i * 7 % 4,
        }
        for i in range(60)
    ]
    write_questions(tmp_path / "cais/wmdp/wmdp-bio", rows)
    write_questions(tmp_path / "EleutherAI/wmdp_bio_cloze/data", rows, "cloze_compatible")
    write_stem(tmp_path)
    names = ["wmdp_bio", "mmlu_stem", "wmdp_bio_cloze_verified"]
    tokenizer, model = make_tokenizer(), make_model("neox", seed=3)
    result = Evaluation(tokenizer, tasks=names, data_dir=tmp_path, batch_tokens=700).run(model)
    reference = evaluate(hflm(model, tokenizer), load_tasks(names, data_dir=tmp_path), bootstrap_iters=1000)
    for table in ("results", "groups"):
        for name, numbers in reference[table].items():
            assert {key: result[table][name][key] for key in numbers} == numbers
    for task, samples in reference["samples"].items():
        for mine, theirs in zip(result["samples"][task], samples, strict=True):
            assert set(theirs) == set(mine)
            for (score, greedy), (expected, known) in zip(
                mine["filtered_resps"], theirs["filtered_resps"], strict=True
            ):
                assert score == pytest.approx(expected, abs=1e-5) and greedy == known
            different = {"resps", "filtered_resps"}  # the log-likelihoods, compared above
            assert {k: v for k, v in mine.items() if k not in different} == {
                k: v for k, v in theirs.items() if k not in different
            }
    assert len({sample["acc_norm"] for sample in result["samples"]["wmdp_bio_cloze_verified"]}) == 2
    assert result["n-samples"] == reference["n-samples"] and result["configs"].keys() == reference["configs"].keys()
