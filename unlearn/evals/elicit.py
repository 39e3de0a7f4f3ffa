"""What a model still knows, found without training it: see `ways.py`, `wordings.py`, `early.py` and `probe.py` in
`evals/attack`.

    python evals/elicit.py --model runs/NAME/model --original MODEL --tasks wmdp_bio --data-dir questions --output looks

Any number of ranks gives the same numbers. Writes elicit.json and table.md.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.config import parse_flags
from unlearn.errors import UserError
from unlearn.evals.elicit_config import ElicitConfig
from unlearn.run.command_line import typed_command

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unlearn.evals.evaluation import Evaluation
    from unlearn.lens import TunedLens

OWN = frozenset(("elicit.json", "table.md"))
AS_IT_IS, OTHERS = "as it is", "other questions"
FACT = "fact"  # column of the questions that says what each is about


def elicit(config: ElicitConfig) -> None:
    """Load, look, write and print."""
    # Here and not above, so that --help and a wrong flag answer at once.
    from unlearn.distributed import is_main, process_group
    from unlearn.model import load_config, load_model, load_tokenizer
    from unlearn.precision import DTYPES
    from unlearn.run.folder import check_output

    with process_group(config.device) as device:
        inputs = (config.model, config.original, config.lens, config.data_dir, config.paraphrases)
        folder = check_output(config.output, config.overwrite, OWN, inputs)
        tokenizer, model_config = load_tokenizer(config.model, revision=config.revision), load_config(config.model)
        evaluations = dict(_evaluations(config, tokenizer, model_config))
        if OTHERS in evaluations:
            _check_paired(evaluations[AS_IT_IS], evaluations[OTHERS])
        model = load_model(config.model, revision=config.revision, dtype=DTYPES[config.dtype], device=device)
        original = _original(config, model, device)
        found = looks(evaluations, model, original, _lens(config, model))
        result: dict[str, Any] = {"model": config.model, "command": typed_command()}
        result["questions"] = evaluations[AS_IT_IS].sha256()
        result |= {"ways": judged(found), "probe": probes(config, found[AS_IT_IS].result, model, tokenizer)}
        _write(folder, result)
        if is_main():
            print(f"{table(result)}\n\n{in_words(result)}")


@dataclass(frozen=True)
class Look:
    """The result of an evaluation, and how many seconds it took."""

    result: dict[str, Any]
    seconds: float


def _evaluations(config: ElicitConfig, tokenizer: Any, model_config: Any) -> "Iterator[tuple[str, Evaluation]]":
    """The questions as they are asked each way that changes no weight."""
    from unlearn.evals.attack.wordings import WORDINGS
    from unlearn.evals.evaluation import Evaluation

    asked: dict[str, Any] = {"tasks": config.tasks, "data_dir": config.data_dir, "include_path": config.include_path}
    asked |= {"limit": config.limit, "subsample": config.subsample, "device": config.device}
    asked["model_config"] = model_config
    yield AS_IT_IS, Evaluation(tokenizer, **asked)
    for name, wording in WORDINGS.items() if config.wordings else ():
        yield name, Evaluation(tokenizer, wording=wording, **asked)
    if config.paraphrases is not None:
        yield OTHERS, Evaluation(tokenizer, **asked | {"data_dir": config.paraphrases})
    if config.num_fewshot:
        shots = config.num_fewshot
        yield f"{shots} examples", Evaluation(tokenizer, shots=shots, **asked)


def _lens(config: ElicitConfig, model: "PreTrainedModel") -> "TunedLens | None":
    from unlearn.lens import TunedLens, fitted_layers

    return None if config.lens is None else TunedLens.load(config.lens, model, fitted_layers(config.lens))


def _original(config: ElicitConfig, model: "PreTrainedModel", device: "torch.device") -> "PreTrainedModel | None":
    from unlearn.model import load_model
    from unlearn.precision import DTYPES

    if config.original is None:
        return None
    original = load_model(config.original, dtype=DTYPES[config.dtype], device=device)
    shapes = [{name: parameter.shape for name, parameter in one.named_parameters()} for one in (model, original)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"expected --original of the shape of {config.model}; found another in {config.original}: give the model "
            "that it was made from"
        )
    return original


def looks(
    evaluations: "dict[str, Evaluation]",
    model: "PreTrainedModel",
    original: "PreTrainedModel | None",
    lens: "TunedLens | None" = None,
) -> dict[str, Look]:
    """What each way shows. Every rank must call it."""
    from unlearn.evals.attack.early import read_early
    from unlearn.evals.attack.ways import taken, ways

    found: dict[str, Look] = {}
    plain = evaluations[AS_IT_IS]

    def look(name: str, evaluation: "Evaluation", changed: "AbstractContextManager[None]") -> None:
        started = time.monotonic()
        with changed:
            result = evaluation.run(model, name=name)
        found[name] = Look(result, time.monotonic() - started)

    for name, evaluation in evaluations.items():
        look(name, evaluation, nullcontext())
    for way in ways(original is not None):
        look(way.name, plain, taken(way, model, original))
    for layer in [] if lens is None else lens.layers:
        look(f"lens at layer {layer}", plain, read_early(model, lens, layer))  # type: ignore[arg-type]
    return found


def _check_paired(plain: "Evaluation", others: "Evaluation") -> None:
    """Raise unless both ask the same questions row by row: of as many, and about the same facts where a column says
    which."""
    for name, task in plain.tasks.items():
        if others.tasks[name].available != task.available:
            raise UserError(
                f"expected {task.available} questions of {name} in --paraphrases, as in --data-dir, one for one; found "
                f"{others.tasks[name].available}: give the same questions in other words"
            )
        for row, pair in enumerate(zip(task.eval_docs, others.tasks[name].eval_docs, strict=True), 1):
            one, other = (document.get(FACT) for document in pair)
            if one != other:
                raise UserError(
                    f"expected questions of {name} in --paraphrases in the order of --data-dir; found as number {row} "
                    f"one on {FACT} {other!r} beside {one!r}: sort them alike"
                )


def judged(found: dict[str, Look]) -> dict[str, dict[str, Any]]:
    """Of each way: seconds, the summary of each task, and how likely as many more right answers are by chance.

    That is `p_gain`, McNemar's one-sided test over the same questions, corrected for the number of ways (`stats.holm`).
    """
    from unlearn.evals.judge.stats import holm, mcnemar
    from unlearn.evals.judge.summary import summarise

    ways: dict[str, dict[str, Any]] = {
        name: {"seconds": round(look.seconds, 2), "tasks": summarise(look.result)} for name, look in found.items()
    }
    others = [name for name in ways if name != AS_IT_IS]
    for task, before in found[AS_IT_IS].result["answers"].items():
        chances = []
        for name in others:
            pairs = list(zip(before.right, found[name].result["answers"][task].right, strict=True))
            gained, lost = (sum(sign * (new - old) > 0 for old, new in pairs) for sign in (1, -1))
            chances.append(mcnemar(gained, lost) / 2 if gained > lost else 1.0)
        for name, chance in zip(others, holm(chances), strict=True):
            ways[name]["tasks"][task]["p_gain"] = chance
    return ways


def probes(
    config: ElicitConfig, result: dict[str, Any], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, dict[str, Any]]:
    """{task with letters: {layer: how often a probe is right, and with shuffled answers}}, alike on all ranks."""
    from unlearn.evals.attack.probe import last_streams, probe, shuffled_targets
    from unlearn.evals.judge.stats import mean_interval

    depth = int(model.config.num_hidden_layers)
    layers, found = config.layers or tuple(range(depth + 1)), dict[str, dict[str, Any]]()
    for layer in layers:
        if not 0 <= layer <= depth:
            raise UserError(f"expected --layers in 0..{depth} (the model has {depth} blocks); found {layer}")
    for task, answers in result["answers"].items():
        if not answers.letters:
            continue
        contexts = [sample["arguments"][0][0] for sample in result["samples"][task]]
        shuffled = shuffled_targets(answers.targets, seed=config.seed)
        found[task] = {}
        for layer, features in last_streams(model, tokenizer, contexts, layers).items():
            right, control = (
                [float(hit) for hit in probe(features, targets, seed=config.seed)]
                for targets in (answers.targets, shuffled)
            )
            numbers = {"acc": sum(right) / len(right), "interval": mean_interval(right), "questions": len(right)}
            found[task][str(layer)] = numbers | {"shuffled": sum(control) / len(control)}
    return found


def _write(folder: Path, result: dict[str, Any]) -> None:
    """Rank 0 writes, for all."""
    from unlearn.distributed import fail_together, is_main
    from unlearn.files import write_json, write_text, writing

    with fail_together():
        if is_main():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "table.md", f"{table(result)}\n\n{in_words(result)}\n")
            write_json(folder / "elicit.json", result)


def table(result: dict[str, Any]) -> str:
    """A row a way, a column a task, in per cent; a star where more is right than can be chance."""
    tasks = list(result["ways"][AS_IT_IS]["tasks"])
    lines = [f"| way | {' | '.join(tasks)} | seconds |", f"|---|{'---|' * len(tasks)}---|"]
    for name, way in result["ways"].items():
        cells = [_cell(way["tasks"][task]) for task in tasks]
        lines.append(f"| {name} | {' | '.join(cells)} | {way['seconds']:.0f} |")
    for layer in next(iter(result["probe"].values()), {}):
        cells = [_cell(result["probe"][task][layer]) if task in result["probe"] else "" for task in tasks]
        lines.append(f"| probe at layer {layer} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _cell(numbers: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in numbers["interval"])
    star = " *" if numbers.get("p_gain", 1.0) < 0.05 else ""
    control = f", shuffled {100 * numbers['shuffled']:.1f}" if "shuffled" in numbers else ""
    return f"{100 * numbers['acc']:.1f} ({low:.1f}-{high:.1f}{control}){star}"


def in_words(result: dict[str, Any]) -> str:
    """What came back, a sentence a task."""
    sentences = []
    for task, before in result["ways"][AS_IT_IS]["tasks"].items():
        sure = {
            name: way["tasks"][task]["acc"]
            for name, way in result["ways"].items()
            if way["tasks"][task].get("p_gain", 1.0) < 0.05
        }
        if sure:
            best = max(sure, key=lambda name: sure[name])
            found = f"{100 * sure[best]:.1f} % by {best}, where it is {100 * before['acc']:.1f} % as it is"
            sentences.append(f"{task}: {found}.")
        else:
            sentences.append(f"{task}: no way brings back more than chance does.")
    return "\n".join(sentences)


def main() -> None:
    """Parse and run."""
    elicit(parse_flags(ElicitConfig))
