"""The fine-tuning attack: does the knowledge come back, and how fast?

    python evals/tamper.py --model runs/NAME/model --forget attack.jsonl --output runs/NAME-attack
    torchrun --nproc_per_node 4 evals/tamper.py --model runs/NAME/model --forget attack.jsonl --output runs/NAME-attack
    python evals/tamper.py --model runs/NAME/model --forget attack.jsonl --retain harmless.jsonl --steps 64 \\
        --grid adam-lr=2e-5,1e-4 lora-rank=0,16 data=forget,mix,retain examples=8,512 \\
        --control original=ORIGINAL --control random --output runs/NAME-attack

An attack is a run of `train.py --method next-token`, on text of the forgotten domain, or harmless text, or both, with
accuracy measured every few steps on the live model; it takes all of train.py's flags, another --method too. --grid
makes several, each a run's folder under attacks/; what they show together is written to attack.json and attack.png.
"""

import dataclasses
import gc
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.errors import NotFinite, UserError
from unlearn.evals.attack.config import UNLEARNED, Subject, TamperConfig, read_attacks
from unlearn.run.signals import EarlyStop

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedTokenizerBase

    from unlearn.batches import Batches
    from unlearn.config import TrainConfig
    from unlearn.corpus import Corpus
    from unlearn.evals.evaluation import Evaluation
    from unlearn.evals.training import Training
    from unlearn.run.run import Run

CURVE = "curve.json"  # of a finished attack, in its own folder


def main() -> None:
    config = read_attacks()
    with EarlyStop(config.output):
        run(config)


def run(config: TamperConfig) -> None:
    """The whole grid, or what an earlier attempt left of it."""
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group(config.device) as device:
        from unlearn.run.folder import ATTACK
        from unlearn.run.run import opened_run

        first = next(iter(config.attacks))
        runs = [config.run(subject, first) for subject in config.subjects()]
        inputs = (runs[0].forget, runs[0].retain, *(one.model for one in runs))
        with opened_run(config, config.output, ATTACK, inputs, device) as run:
            grid = prepare(config, device)
            if not run.finished(grid.identity):
                tamper(grid, run)
            elif is_main():
                print(f"finished before: {run.folder / 'attack.json'}")


@dataclass(frozen=True)
class Grid:
    """Everything that the attacks share, read and found to be right.

    Attributes:
        meshes: by layout and size. identity: digests of what is read.
        reference: the original model's accuracies, where --reference names them.
        warnings: sentences about questions that stand in what the attacks train on, and about text that is not new.
    """

    config: TamperConfig
    evaluation: "Evaluation"
    meshes: "Meshes"
    identity: dict[str, str]
    reference: dict[str, dict[str, Any]] | None
    warnings: list[str]


class Meshes(dict[tuple[str, int | None], "DeviceMesh | None"]):
    """One mesh for all runs of the same layout: another one would cost groups of ranks that nobody frees."""

    def __init__(self, device: "torch.device"):
        super().__init__()
        self.device = device

    def __missing__(self, key: tuple[str, int | None]) -> "DeviceMesh | None":
        from unlearn.sharding import shard_mesh

        self[key] = shard_mesh(*key, self.device)  # type: ignore[arg-type]
        return self[key]

    def of(self, config: "TrainConfig") -> "DeviceMesh | None":
        """The mesh of a run, None where its weights are replicated."""
        from unlearn.distributed import world_size

        return self[config.shard_kind(world_size()), config.shard_size]


def tamper(grid: Grid, run: "Run") -> None:
    """Run what an earlier attempt left of the grid, on the model and then on each control, and write."""
    from unlearn.distributed import fail_together, is_main

    run.begin(grid.identity, {}, 0)
    for subject in grid.config.subjects():
        for name in grid.config.attacks:
            _attack(grid, subject, name, run)
            gc.collect()  # a model with hooks refers to itself: its memory is wanted for the next
    with fail_together():
        if is_main():
            _write(grid, run.folder)
    run.finish()


def prepare(config: TamperConfig, device: "torch.device") -> Grid:
    """Read models' tokenizers, corpora, questions and results, and look for every mistake in them.

    Raises:
        UserError: anything that the flags name is missing, damaged or does not fit the rest; an attack cannot fit.
    """
    from unlearn.assemble import assemble
    from unlearn.evals.evaluation import Evaluation
    from unlearn.model import load_config, load_tokenizer
    from unlearn.model_config import check_rows

    tokenizer, subjects = load_tokenizer(config.model, revision=config.revision), config.subjects()
    identity = _models(config, tokenizer)
    first = config.run(subjects[0], next(iter(config.attacks)))
    evaluation = Evaluation.of(first, tokenizer, load_config(config.model, revision=config.revision))
    for subject in subjects:  # a control may have fewer rows
        check_rows(load_config(subject.model, revision=subject.revision), evaluation.largest_token())
    reference, meshes = _reference(config, evaluation), Meshes(device)
    batches: dict[str, dict[str, Batches]] = {}
    for subject in subjects:
        for name in config.attacks if subject is subjects[0] else [next(iter(config.attacks))]:
            flags = config.run(subject, name)
            try:
                found = assemble(flags, device, meshes.of)
            except UserError as error:
                raise UserError(f"attack {name} on {subject.name}: {error}") from None
            batches.setdefault(name, dict(found.parts.batches))
            identity |= {key: value for key, value in found.identity.items() if key not in ("model", *identity)}
    identity["questions"] = evaluation.sha256()
    _check_examples_differ(config, batches)
    drawn = _drawn(batches)
    return Grid(config, evaluation, meshes, identity, reference, _overlaps(config, drawn, evaluation, tokenizer))


def _check_examples_differ(config: TamperConfig, batches: "Mapping[str, Mapping[str, Batches]]") -> None:
    """Raise `UserError` if two attacks of a grid differ in --examples alone, and draw the same windows all the same."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, found in batches.items():
        others = tuple(part for part in config.attacks[name] if part[0] != "examples")
        key = (others, *(of_corpus.chosen for of_corpus in found.values()))
        if key in seen:
            raise UserError(
                f"expected --examples that draw different windows; found {seen[key]} and {name}, both {key[1:]}: leave "
                "one out, or use a larger corpus"
            )
        seen[key] = name


def _models(config: TamperConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """A digest of the weights of every model.

    Raises:
        UserError: a control is missing, unsupported, or reads text in other tokens.
    """
    from unlearn.files import files_hash
    from unlearn.model import load_config, load_tokenizer
    from unlearn.run.preflight import settings_hashes
    from unlearn.weights import Checkpoint

    found = {}
    for subject in config.subjects():
        try:
            load_config(subject.model, revision=subject.revision)
            same = load_tokenizer(subject.model, revision=subject.revision).get_vocab() == tokenizer.get_vocab()
            checkpoint = Checkpoint.open(subject.model, revision=subject.revision)
        except UserError as error:
            raise error if subject.model == config.model else UserError(f"--control {subject.name}: {error}") from None
        if not same:
            raise UserError(
                f"expected --control {subject.name} with the tokenizer of --model; found another in {subject.model}: "
                "tokens would not count the same, choose another control"
            )
        name = "model" if subject.name == UNLEARNED else f"control {subject.name}"
        found[name] = files_hash(checkpoint.paths())
        found |= {f"{name}'s {what}": digest for what, digest in settings_hashes(checkpoint.folder).items()}
    return found


def _reference(config: TamperConfig, evaluation: "Evaluation") -> dict[str, dict[str, Any]] | None:
    """The original model's accuracies on the hazard tasks, where --reference names them."""
    from unlearn.evals.judge.original import original_accuracies

    if config.reference is None:
        return None
    return original_accuracies(config.reference, config.roles()[0], evaluation, config.split_by)


def _drawn(batches: "Mapping[str, Mapping[str, Batches]]") -> "dict[str, Corpus]":
    """By corpus, the most windows that any attack draws of it."""
    from unlearn.corpus import Corpus

    pairs = [pair for of_attack in batches.values() for pair in of_attack.items()]
    drawn = {}
    for name, found in sorted(pairs, key=lambda pair: pair[1].unique):
        drawn[name] = Corpus(name, 0, [found.corpus.windows[index] for index in sorted(set(found.order))])
    return drawn


def _overlaps(
    config: TamperConfig,
    drawn: "Mapping[str, Corpus]",
    evaluation: "Evaluation",
    tokenizer: "PreTrainedTokenizerBase",
) -> list[str]:
    """Sentences about questions that stand in what the attacks train on, and about text that the model's run has read;
    printed."""
    from unlearn.distributed import fail_together, is_main
    from unlearn.evals.attack.overlap import overlap_warnings, question_texts
    from unlearn.evals.attack.seen import seen_warnings

    warnings = seen_warnings(config.model, drawn, tokenizer, config.seq_len)
    with fail_together():
        if is_main():
            warnings += overlap_warnings(question_texts(evaluation.tasks), drawn, tokenizer)
            for warning in warnings:
                print(f"warning: {warning}", flush=True)
    return warnings


def _attack(grid: Grid, subject: Subject, name: str, run: "Run") -> None:
    """One attack on one model, unless an earlier attempt has finished it.

    An attack that diverges is a result: its curve then has the reason, and the points up to there.
    """
    from unlearn.distributed import fail_together, is_main
    from unlearn.evals.training import measurement, opened
    from unlearn.files import write_json
    from unlearn.run.folder import ONE_ATTACK

    config = grid.config.run(subject, name, str(attack_folder(run.folder, subject.name, name)))
    hazard, general = grid.config.roles()
    wanted, mesh_of = (*hazard, *general), grid.meshes.of
    shared: dict[str, Any] = {"evaluation": grid.evaluation, "mesh_of": mesh_of, "marker": run.marker, "wanted": wanted}
    with opened(config, run.device, own=ONE_ATTACK, keeps_answers=True, **shared) as training:
        if training.finished():
            return
        if is_main():
            print(f"attack {name} on {subject.name}", flush=True)
        reason = None
        try:
            training.train()
        except NotFinite as error:
            if not measurement(training.folder, 0).is_file():
                raise  # of the model as it came
            training.run.stop.obey()  # the next attack would not know of a signal that came in these steps
            reason = str(error)
        with fail_together():
            if is_main():
                write_json(training.folder / CURVE, _curve(training, reason))
        training.finish()


def _curve(training: "Training", reason: str | None) -> dict[str, Any]:
    """What curve.json holds; `diverged` is the reason, None for an attack that came to its end."""
    from unlearn.evals.training import measurement

    found, steps = training.unlearning, training.unlearning.steps
    main = [term.batches for term in found.phases[-1].terms]
    batches = [one for one in found.parts.batches.values() if one in main]
    read = ((phase, step) for phase in found.phases for step in range(found.steps_of(phase)))
    tokens = [0, *accumulate(sum(term.batches.tokens(step) for term in phase.terms) for phase, step in read)]
    files = {step: measurement(training.folder, step) for step in range(steps + 1)}
    return {
        "steps": steps,
        "unique": sum(one.unique for one in batches),
        "batch": sum(one.batch for one in batches),
        "tokens": tokens[-1],
        "diverged": reason,
        "points": [
            {"step": step, "tokens": tokens[step], "tasks": json.loads(file.read_text(encoding="utf-8"))}
            for step, file in files.items()
            if file.is_file()
        ],
    }


def attack_folder(folder: Path, subject: str, name: str) -> Path:
    """Where one attack of a grid keeps its files."""
    return folder / "attacks" / subject / name


def _write(grid: Grid, folder: Path) -> None:
    """Write attack.json and the picture, and print the table."""
    from unlearn.evals.attack.results import Curves, results, table
    from unlearn.files import write_json
    from unlearn.run.folder import as_json

    config, warnings = grid.config, grid.warnings
    curves = {
        subject.name: {
            name: json.loads((attack_folder(folder, subject.name, name) / CURVE).read_text(encoding="utf-8"))
            for name in config.attacks
        }
        for subject in config.subjects()
    }
    found = Curves(config, curves)
    written = results(as_json(dataclasses.asdict(config)), found, grid.reference, warnings)
    write_json(folder / "attack.json", written)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'unlearn[report]')")
    else:
        _plot(config, found, written, folder / "attack.png")
    for warning in written["warnings"][len(warnings) :]:  # the first were said before the attacks
        print(f"warning: {warning}")
    print(f"{table(found, grid.reference)}\nattack: {folder / 'attack.json'}")


def _plot(config: TamperConfig, curves: Any, written: Mapping[str, Any], path: Path) -> None:
    from unlearn.evals.attack.plot import plot_attack, plot_grid

    if len(config.attacks) == 1 and not config.control:
        shown = [task for task in config.eval_tasks if task in written["points"][0]["tasks"]]
        plot_attack(written["points"], list(dict.fromkeys([*written["hazard"], *shown])), path)
    else:
        plot_grid(curves, path)
