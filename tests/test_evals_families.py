"""Every family of lm-eval's tasks with choices, on made-up rows of the published columns, against lm-eval itself."""

from collections.abc import Callable
from typing import Any

import pytest
from evals_stock import stock_tasks
from evals_support import make_model, make_tokenizer, write_questions
from lm_eval.evaluator import evaluate

from unlearn.evals.evaluation import BATCH_TOKENS, Evaluation
from unlearn.evals.harness.lm import LiveModel

WORDS = "fox dog lazy planet red over again quick brown jumps the Which".split()
Row = dict[str, Any]


def words(number: int, count: int = 3) -> str:
    return " ".join(WORDS[(number * 7 + place * 5 + place * number) % len(WORDS)] for place in range(count))


def texts(number: int, count: int = 4) -> list[str]:
    return [words(number + 11 * place, 1 + (number + place) % 4) + f" {place}" for place in range(count)]


def columns(**made: Any) -> Callable[[int], Row]:
    """Rows with these columns: a string is a text, a number that many labels in turn, a function makes the value."""

    def row(number: int) -> Row:
        values: Row = {}
        for place, (name, kind) in enumerate(made.items()):
            if callable(kind):
                values[name] = kind(number)
            elif isinstance(kind, int):
                values[name] = number % kind
            else:
                values[name] = f"{kind} {words(number + 13 * place)}"
        return values

    return row


def labelled(number: int) -> dict[str, list[str]]:
    return {"text": texts(number), "label": list("ABCD")}


def letter(names: str) -> Callable[[int], str]:
    return lambda number: names[number % len(names)]


def truthful(number: int) -> dict[str, list[Any]]:
    return {"choices": texts(number), "labels": [1, number % 2, 0, 0]}


SUPER, GLUE = "aps/super_glue", "nyu-mll/glue"
PAIR = columns(sentence1="The", sentence2="A", label=2)
FAMILIES: dict[str, tuple[str, str, Callable[[int], Row]]] = {  # task: (data set and its configuration, split, row)
    "arc_easy": (
        "allenai/ai2_arc/ARC-Easy",
        "test",
        columns(question="Is", choices=labelled, answerKey=letter("ABCD")),
    ),
    "openbookqa": (
        "allenai/openbookqa/main",
        "test",
        columns(question_stem="The", choices=labelled, answerKey=letter("DBAC")),
    ),
    "hellaswag": (
        "Rowan/hellaswag",
        "validation",
        columns(ctx_a="A", ctx_b="then", activity_label="Run", endings=texts, label=lambda number: str(number % 4)),
    ),
    "piqa": ("baber/piqa", "validation", columns(goal="To", sol1="use", sol2="take the", label=2)),
    "winogrande": (
        "allenai/winogrande/winogrande_xl",
        "validation",
        columns(
            sentence=lambda number: f"The {words(number)} chased _ over {words(number + 3, 2)}.",
            option1="fox",
            option2="the dog",
            answer=letter("12"),
        ),
    ),
    "xwinograd_en": (
        "Muennighoff/xwinograd/en",
        "test",
        columns(
            sentence=lambda number: f"The {words(number)} chased _ over {words(number + 3, 2)}.",
            option1="fox",
            option2="the dog",
            answer=letter("12"),
        ),
    ),
    "boolq": (f"{SUPER}/boolq", "validation", columns(passage="The", question="is it", label=2)),
    "copa": (
        f"{SUPER}/copa",
        "validation",
        columns(
            premise="The fox.", choice1="It", choice2="They", question=lambda n: ("cause", "effect")[n % 2], label=2
        ),
    ),
    "cb": (f"{SUPER}/cb", "validation", columns(premise="The", hypothesis="A", label=3)),
    "wic": (
        f"{SUPER}/wic",
        "validation",
        columns(
            sentence1=lambda number: f"the {words(number)}",
            sentence2="over",
            start1=lambda _: 0,
            end1=lambda _: 3,
            label=2,
        ),
    ),
    "multirc": (f"{SUPER}/multirc", "validation", columns(paragraph="The", question="Is", answer="it", label=2)),
    "rte": (f"{GLUE}/rte", "validation", PAIR),
    "mrpc": (f"{GLUE}/mrpc", "validation", PAIR),
    "qnli": (f"{GLUE}/qnli", "validation", columns(question="Is", sentence="It", label=2)),
    "sst2": (f"{GLUE}/sst2", "validation", columns(sentence="The", label=2)),
    "cola": (f"{GLUE}/cola", "validation", columns(sentence="The", label=2)),
    "mnli": (f"{GLUE}/mnli", "validation_matched", columns(premise="The", hypothesis="A", label=3)),
    "sciq": (
        "allenai/sciq",
        "test",
        columns(support=" The", question="Is", distractor1="a", distractor2="b", distractor3="c", correct_answer="dog"),
    ),
    "truthfulqa_mc1": (
        "truthfulqa/truthful_qa/multiple_choice",
        "validation",
        columns(question="Is", mc1_targets=truthful, mc2_targets=truthful),
    ),
    "truthfulqa_mc2": (
        "truthfulqa/truthful_qa/multiple_choice",
        "validation",
        columns(question="Is", mc1_targets=truthful, mc2_targets=truthful),
    ),
    "lambada_openai": ("EleutherAI/lambada_openai/default", "test", columns(text="The quick brown")),
    "logiqa": (
        "EleutherAI/logiqa/logiqa",
        "test",
        columns(context="The", question="Is", options=texts, label=letter("abcd")),
    ),
    "commonsense_qa": (
        "tau/commonsense_qa",
        "validation",
        columns(
            question="Is", choices=lambda n: {"text": texts(n, 5), "label": list("ABCDE")}, answerKey=letter("ABCDE")
        ),
    ),
    "social_iqa": (
        "lighteval/siqa",
        "validation",
        columns(context="The", question="Is", answerA="a", answerB="the b", answerC="c of", label=letter("123")),
    ),
    "medmcqa": (
        "openlifescienceai/medmcqa",
        "validation",
        columns(question="Is", opa="a", opb="b", opc="c", opd="d", cop=4),
    ),
    "headqa_en": (
        "EleutherAI/headqa/en",
        "test",
        columns(
            qtext="Is",
            answers=lambda n: [{"aid": place + 1, "atext": text} for place, text in enumerate(texts(n))],
            ra=lambda n: n % 4 + 1,
        ),
    ),
    "blimp_adjunct_island": (
        "nyu-mll/blimp/adjunct_island",
        "train",
        columns(sentence_good="The", sentence_bad="Over"),
    ),
    "ethics_cm": ("EleutherAI/hendrycks_ethics/commonsense", "test", columns(input="The", label=2)),
    "anli_r1": ("facebook/anli", "test_r1", columns(premise="The", hypothesis="A", label=3)),
    "mutual": (
        "EleutherAI/mutual/mutual",
        "validation",
        columns(article="m : Is", options=texts, answers=letter("ABCD")),
    ),
    "swag": (
        "allenai/swag/regular",
        "validation",
        columns(startphrase="The", ending0="a", ending1="the b", ending2="c", ending3="over d", label=4),
    ),
    "xnli_en": ("facebook/xnli/en", "validation", columns(premise="The", hypothesis="a", label=3)),
    "xcopa_it": (
        "cambridgeltl/xcopa/it",
        "test",
        columns(
            premise="The fox.", choice1="It", choice2="They", question=lambda n: ("cause", "effect")[n % 2], label=2
        ),
    ),
    "xstorycloze_en": (
        "juletxara/xstory_cloze/en",
        "eval",
        columns(
            **{f"input_sentence_{place}": "The" for place in range(1, 5)},
            sentence_quiz1="It",
            sentence_quiz2="Again",
            answer_right_ending=lambda n: n % 2 + 1,
        ),
    ),
    "mathqa": (
        "regisss/math_qa",
        "test",
        columns(
            Problem="Is",
            options=lambda n: f"a ) {n} , b ) {n + 1} , c ) 3{n} , d ) 4 , e ) none",
            correct=letter("abcde"),
        ),
    ),
    "crows_pairs_english": (
        "jannalu/crows_pairs_multilingual/english",
        "test",
        columns(sent_more="The", sent_less="Over", stereo_antistereo=lambda _: "stereo", bias_type=lambda _: "age"),
    ),
    "webqs": ("stanfordnlp/web_questions", "test", columns(question="Is", answers=lambda n: texts(n, 1 + n % 3))),
    "pubmedqa": (
        "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source",
        "test",
        columns(
            QUESTION="Is",
            CONTEXTS=lambda n: [words(n), words(n + 1)],
            final_decision=lambda n: ("yes", "no", "maybe")[n % 3],
        ),
    ),
    "agieval_lsat_ar": (
        "hails/agieval-lsat-ar",
        "test",
        columns(query="Is", choices=texts, gold=lambda n: [n % 4] + [0] * (n % 2)),
    ),
    "paws_en": (
        "google-research-datasets/paws-x/en",
        "test",
        columns(sentence1="The fox.", sentence2="A dog.", label=2),
    ),
    "mc_taco": ("CogComp/mc_taco", "test", columns(sentence="The", question="Is", answer="it", label=2)),
    "belebele_eng_Latn": (
        "facebook/belebele/eng_Latn",
        "test",
        columns(
            flores_passage="The",
            question="Is",
            **{f"mc_answer{place}": f"{place}" for place in range(1, 5)},
            correct_answer_num=letter("1234"),
        ),
    ),
    "ethics_deontology": (
        "EleutherAI/hendrycks_ethics/deontology",
        "test",
        columns(scenario="The", excuse="But", label=2),
    ),
    "mmlu_anatomy": (
        "cais/mmlu/anatomy",
        "test",
        columns(question="Is", choices=texts, answer=4, subject=lambda _: "anatomy"),
    ),
}
WITHOUT_ACCURACY = {"cola", "crows_pairs_english", "mutual"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, lm-eval's) of all families at once."""
    folder = tmp_path_factory.mktemp("families")
    rows = {task: [row(number) for number in range(7)] for task, (_, _, row) in FAMILIES.items()}
    for task, (place, split, _) in FAMILIES.items():
        write_questions(folder / place, rows[task], split)
    tokenizer, model = make_tokenizer(more=("Answer: E E E",)), make_model("neox", positions=2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.evals.evaluation.BOOTSTRAP_ITERS", 2)  # only of F1 and the like, which are resampled
        ours = Evaluation(tokenizer, tasks=list(FAMILIES), data_dir=folder).run(model)
    theirs = evaluate(
        LiveModel(model, tokenizer, batch_tokens=BATCH_TOKENS["cpu"]),
        stock_tasks(folder, list(FAMILIES)),
        bootstrap_iters=2,
    )
    assert theirs is not None
    return ours, dict(theirs)


@pytest.mark.parametrize("task", FAMILIES)
def test_numbers_and_prompts_are_lm_evals_own(results: tuple[dict[str, Any], dict[str, Any]], task: str) -> None:
    """WinoGrande, TruthfulQA MC2 and others failed after all forward passes, or were summed up as another number."""
    ours, theirs = (result["results"][task] for result in results)
    assert {key: value for key, value in ours.items() if "," in key} == {
        key: pytest.approx(value, abs=1e-12) for key, value in theirs.items() if "," in key
    }
    asked = [[sample["arguments"] for sample in result["samples"][task]] for result in results]
    assert asked[0] == asked[1]
    summary = results[0]["unlearn"]["summary"]
    assert (task in summary) == (task not in WITHOUT_ACCURACY)
    if task in summary:
        numbers = summary[task]
        assert numbers["acc"] == pytest.approx(theirs[f"{numbers['metric']},none"], abs=1e-12)
        assert numbers["stderr"] == pytest.approx(theirs[f"{numbers['metric']}_stderr,none"], abs=1e-12)
        low, high = numbers["interval"]
        assert 0.0 <= low <= numbers["acc"] <= high <= 1.0 and low < high
