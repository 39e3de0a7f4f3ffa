"""The fine-tuning attack: does the knowledge come back, and how fast?

    python evals/tamper.py --model runs/NAME/model --corpus attack.jsonl --output runs/NAME-attack
    torchrun --nproc_per_node 4 evals/tamper.py --model runs/NAME/model --corpus attack.jsonl --output runs/NAME-attack
    python evals/tamper.py --model runs/NAME/model --corpus attack.jsonl --benign-corpus benign.jsonl \\
        --lr 2e-5 1e-4 --lora-rank 0 16 --data forget mix benign --examples 8 512 --steps 64 \\
        --control original=ORIGINAL --control random --output runs/NAME-attack

A model is trained with AdamW on text of the forgotten domain, or harmless text, or both; accuracy is measured every
few steps on the live model. Flags with several values make a grid of attacks, each in a folder of its own under
attacks/; what they show together is written to attack.json and attack.png.
"""

import dataclasses
import gc
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.tamper_config import UNLEARNED, Attack, Subject, TamperConfig
from unlearn.config import parse_flags
from unlearn.errors import UserError, run_command
from unlearn.signals import EarlyStop

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedTokenizerBase

    from evals.evaluation import Evaluation
    from unlearn.attempt import Attempt
    from unlearn.data import Batches, Corpus


def main() -> None:
    config = parse_flags(TamperConfig)
    with EarlyStop(config.output):
        run(config)


def run(config: TamperConfig) -> None:
    """The whole grid, or what an earlier attempt left of it."""
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group(config.device) as device:
        from evals.attack_memory import check_attacks_fit
        from unlearn.attempt import attempt
        from unlearn.run_folder import ATTACK

        inputs = (config.corpus, config.benign_corpus, *(subject.model for subject in config.subjects()))
        with attempt(config, config.output, ATTACK, inputs, device) as this:
            grid = prepare(config)
            check_attacks_fit(config, grid.batches, device)
            if not this.stands(grid.identity):
                tamper(grid, this)
            elif is_main():
                print(f"finished before: {this.folder / 'attack.json'}")


@dataclass(frozen=True)
class Grid:
    """Everything that the attacks share, read and found to be right.

    Attributes:
        batches: of each attack. identity: digests of what was read.
        reference: the original model's accuracies, where --reference names them.
        warnings: sentences about questions that stand in what the attacks train on, and about text that is not new.
    """

    config: TamperConfig
    tokenizer: "PreTrainedTokenizerBase"
    evaluation: "Evaluation"
    batches: dict[Attack, "Batches"]
    identity: dict[str, str]
    reference: dict[str, dict[str, Any]] | None
    warnings: list[str]


def tamper(grid: Grid, this: "Attempt") -> None:
    """Run what an earlier attempt left of the grid, on the model and then on each control, and write."""
    from unlearn.distributed import fail_together, is_main, world_size
    from unlearn.sharding import shard_mesh

    config = grid.config
    this.claim(grid.identity, {}, 0)
    meshes: dict[str, DeviceMesh | None] = {}
    for subject in config.subjects():
        for attack in config.attacks():
            kind = config.shard_kind(attack, world_size())
            if kind not in meshes:
                meshes[kind] = shard_mesh(kind, config.shard_size, this.device)
            _run(grid, subject, attack, meshes[kind], this)
            gc.collect()  # a model with hooks refers to itself: its memory is wanted for the next
    with fail_together():
        if is_main():
            _write(grid, this.folder)
    this.finish()


def prepare(config: TamperConfig) -> Grid:
    """Read models' tokenizers, corpora, questions and results, and look for every mistake in them.

    Raises:
        UserError: anything that the flags name is missing, damaged or does not fit the rest.
    """
    from evals.evaluation import Evaluation
    from evals.fine_tuning import AttackFlags, attack_batches, check_examples_differ
    from unlearn.model import load_config, load_tokenizer
    from unlearn.model_config import check_rows, check_windows, largest_tokens

    tokenizer = load_tokenizer(config.model, revision=config.revision)
    identity = _models(config, tokenizer)
    corpora = _corpora(config, tokenizer)
    windows = {corpus.name: corpus.windows for corpus in corpora.values()}
    check_windows(load_config(config.model, revision=config.revision), windows)
    identity |= {f"{name} corpus": corpus.sha256() for name, corpus in corpora.items()}
    evaluation = Evaluation.of(config, tokenizer, load_config(config.model, revision=config.revision))
    identity["questions"] = evaluation.sha256()
    for subject in config.subjects():  # a control may have fewer rows
        check_rows(
            load_config(subject.model, revision=subject.revision), largest_tokens(windows) | evaluation.largest_token()
        )
    reference = _reference(config, evaluation)
    flags = {attack: AttackFlags.of(config, config.subjects()[0], attack) for attack in config.attacks()}
    batches = {attack: attack_batches(of_attack, corpora) for attack, of_attack in flags.items()}
    check_examples_differ(batches)
    warnings = _overlaps(config, batches, evaluation, tokenizer)
    return Grid(config, tokenizer, evaluation, batches, identity, reference, warnings)


def _models(config: TamperConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """A digest of the weights of every model.

    Raises:
        UserError: a control is missing, unsupported, or reads text in other tokens.
    """
    from unlearn.files import files_hash
    from unlearn.model import load_config, load_tokenizer
    from unlearn.preflight import settings_hashes
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


def _corpora(config: TamperConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "Corpus"]:
    from unlearn.data import read_corpus

    sources = {
        "forget": (config.corpus, config.column, config.template, "--column"),
        "benign": (config.benign_corpus, config.benign_column, config.benign_template, "--benign-column"),
    }
    return {
        name: read_corpus(source, tokenizer, seq_len=config.seq_len, column=column, template=template, column_flag=flag)
        for name, (source, column, template, flag) in sources.items()
        if source is not None
    }


def _reference(config: TamperConfig, evaluation: "Evaluation") -> dict[str, dict[str, Any]] | None:
    """The original model's accuracies on the hazard tasks, where --reference names them."""
    from evals.original import original_accuracies

    if config.reference is None:
        return None
    return original_accuracies(config.reference, config.roles()[0], evaluation, config.split_by)


def _overlaps(
    config: TamperConfig,
    batches: Mapping[Attack, "Batches"],
    evaluation: "Evaluation",
    tokenizer: "PreTrainedTokenizerBase",
) -> list[str]:
    """Sentences about questions that stand in what the attacks train on, and about text that the model's run has read;
    printed."""
    from evals.overlap import overlap_warnings, question_texts
    from evals.seen import seen_warnings
    from unlearn.data import Corpus
    from unlearn.distributed import fail_together, is_main

    drawn: dict[str, Corpus] = {}
    for attack, found in sorted(batches.items(), key=lambda pair: pair[1].unique):
        windows = [found.corpus.windows[index] for index in sorted(set(found.order))]
        drawn[attack.data] = Corpus(attack.data, 0, windows)  # the most that any attack draws
    warnings = seen_warnings(config.model, drawn, tokenizer, config.seq_len)
    with fail_together():
        if is_main():
            warnings += overlap_warnings(question_texts(evaluation.tasks), drawn, tokenizer)
            for warning in warnings:
                print(f"warning: {warning}", flush=True)
    return warnings


def _run(grid: Grid, subject: Subject, attack: Attack, mesh: "DeviceMesh | None", this: "Attempt") -> None:
    """One attack on one model, unless an earlier attempt has finished it."""
    from evals.fine_tuning import AttackFlags, attack_model
    from unlearn.attempt import attempt
    from unlearn.run_folder import ONE_ATTACK

    flags = AttackFlags.of(grid.config, subject, attack)
    place = str(attack_folder(this.folder, subject.name, attack))
    with attempt(flags, place, ONE_ATTACK, (), this.device, marker=this.marker) as one:
        if not one.stands(grid.identity):
            export = this.folder / "model" if grid.config.save_model else None
            shared = (grid.batches[attack], grid.evaluation, grid.tokenizer, mesh)
            attack_model(flags, *shared, one, identity=grid.identity, export=export)


def attack_folder(folder: Path, subject: str, attack: Attack) -> Path:
    """Where one attack of a grid keeps its files."""
    return folder / "attacks" / subject / attack.name


def _write(grid: Grid, folder: Path) -> None:
    """Write attack.json and the picture, and print the table."""
    from evals.attack_results import Curves, results, table
    from evals.fine_tuning import CURVE
    from unlearn.files import write_json

    config, warnings = grid.config, grid.warnings
    attacks = {attack.name: attack for attack in config.attacks()}
    curves = {
        subject.name: {
            name: json.loads((attack_folder(folder, subject.name, attack) / CURVE).read_text(encoding="utf-8"))
            for name, attack in attacks.items()
        }
        for subject in config.subjects()
    }
    found = Curves(config, attacks, curves)
    written = results(dataclasses.asdict(config), found, grid.reference, warnings)
    write_json(folder / "attack.json", written)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'unlearn[report]')")
    else:
        _plot(config, found, written, folder / "attack.png")
    for warning in written["warnings"][len(warnings) :]:  # the first were said before the attacks
        print(f"warning: {warning}")
    print(f"{table(found, grid.reference)}\nattack: {folder / 'attack.json'}")


def _plot(config: TamperConfig, curves: Any, written: Mapping[str, Any], path: Path) -> None:
    from evals.attack_plot import plot_attack, plot_grid

    if len(config.attacks()) == 1 and not config.control:
        shown = [task for task in config.eval_tasks if task in written["points"][0]["tasks"]]
        plot_attack(written["points"], list(dict.fromkeys([*written["hazard"], *shown])), path)
    else:
        plot_grid(curves, path)


if __name__ == "__main__":
    run_command("evals/tamper.py", main)
