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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.tamper_config import Attack, Subject, TamperConfig
from unlearn.config import parse_flags
from unlearn.errors import UserError, run_command

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from evals.evaluation import Evaluation
    from unlearn.attempt import Attempt
    from unlearn.data import Batches, Corpus


def main() -> None:
    config = parse_flags(TamperConfig)
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group() as device:
        from unlearn.attempt import attempt
        from unlearn.run_folder import ATTACK

        inputs = (config.corpus, config.benign_corpus, *(subject.model for subject in config.subjects()))
        with attempt(config, config.output, ATTACK, inputs, device) as this:
            if not this.finished:
                tamper(config, device, this)
            elif is_main():
                print(f"finished before: {this.folder / 'attack.json'}")


def tamper(config: TamperConfig, device: "torch.device", this: "Attempt") -> None:
    """Read everything, run what an earlier attempt left of the grid, write."""
    from evals.evaluation import Evaluation
    from evals.fine_tuning import AttackFlags, attack_batches, check_examples_differ
    from unlearn.distributed import fail_together, is_main
    from unlearn.model import load_config, load_tokenizer

    tokenizer = load_tokenizer(config.model, revision=config.revision)
    identity = _models(config, tokenizer)
    corpora = _corpora(config, tokenizer)
    identity |= {f"{name} corpus": corpus.sha256() for name, corpus in corpora.items()}
    evaluation = Evaluation.of(config, tokenizer, load_config(config.model, revision=config.revision))
    reference = _reference(config, evaluation)
    unlearned = config.subjects()[0]
    batches = {
        attack: attack_batches(AttackFlags.of(config, unlearned, attack), corpora) for attack in config.attacks()
    }
    check_examples_differ(batches)
    warnings = _overlaps(batches, evaluation, tokenizer)
    this.claim(identity, {}, 0)
    for subject in config.subjects():
        for attack in config.attacks():
            _run(config, subject, attack, batches[attack], evaluation, tokenizer, this, identity)
            gc.collect()  # a model with hooks refers to itself: its memory is wanted for the next
    with fail_together():
        if is_main():
            _write(config, this.folder, reference, warnings)
    this.finish()


def _models(config: TamperConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """A digest of the weights of every model.

    Raises:
        UserError: a control is missing, unsupported, or reads text in other tokens.
    """
    from unlearn.model import load_config, load_tokenizer
    from unlearn.preflight import files_hash
    from unlearn.weights import Checkpoint

    found = {}
    for subject in config.subjects():
        try:
            load_config(subject.model, revision=subject.revision)
            same = load_tokenizer(subject.model, revision=subject.revision).get_vocab() == tokenizer.get_vocab()
            files = Checkpoint.open(subject.model, revision=subject.revision).paths()
        except UserError as error:
            raise error if subject.model == config.model else UserError(f"--control {subject.name}: {error}") from None
        if not same:
            raise UserError(
                f"expected --control {subject.name} with the tokenizer of --model; found another in {subject.model}: "
                "tokens would not count the same, choose another control"
            )
        found["model" if subject is config.subjects()[0] else f"model {subject.name}"] = files_hash(files)
    return found


def _corpora(config: TamperConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "Corpus"]:
    from unlearn.data import read_corpus

    sources = {
        "forget": (config.corpus, config.column, config.template),
        "benign": (config.benign_corpus, config.benign_column, config.benign_template),
    }
    return {
        name: read_corpus(source, tokenizer, seq_len=config.seq_len, column=column, template=template)
        for name, (source, column, template) in sources.items()
        if source is not None
    }


def _reference(config: TamperConfig, evaluation: "Evaluation") -> dict[str, dict[str, Any]] | None:
    """The original model's accuracies on the hazard tasks, where --reference names them."""
    from evals.original import original_accuracies

    if config.reference is None:
        return None
    return original_accuracies(config.reference, config.roles()[0], evaluation, config.split_by)


def _overlaps(
    batches: Mapping[Attack, "Batches"],
    evaluation: "Evaluation",
    tokenizer: "PreTrainedTokenizerBase",
) -> list[str]:
    """Sentences about questions that stand in what the attacks train on; printed."""
    from evals.overlap import overlap_warnings, question_texts
    from unlearn.data import Corpus
    from unlearn.distributed import fail_together, is_main

    warnings: list[str] = []
    with fail_together():
        if is_main():
            drawn: dict[str, Corpus] = {}
            for attack, found in sorted(batches.items(), key=lambda pair: pair[1].unique):
                windows = [found.corpus.windows[index] for index in sorted(set(found.order))]
                drawn[attack.data] = Corpus(attack.data, 0, windows)  # the most that any attack draws
            warnings = overlap_warnings(question_texts(evaluation.tasks), drawn, tokenizer)
            for warning in warnings:
                print(f"warning: {warning}", flush=True)
    return warnings


def _run(
    config: TamperConfig,
    subject: Subject,
    attack: Attack,
    batches: "Batches",
    evaluation: "Evaluation",
    tokenizer: "PreTrainedTokenizerBase",
    this: "Attempt",
    identity: Mapping[str, str],
) -> None:
    """One attack on one model, unless an earlier attempt has finished it."""
    from evals.fine_tuning import AttackFlags, attack_model
    from unlearn.attempt import attempt
    from unlearn.distributed import world_size
    from unlearn.run_folder import ONE_ATTACK
    from unlearn.sharding import shard_mesh

    place = str(attack_folder(this.folder, subject.name, attack))
    flags = AttackFlags.of(config, subject, attack)
    with attempt(flags, place, ONE_ATTACK, (), this.device, marker=this.marker) as one:
        if one.finished:
            return
        mesh = shard_mesh(config.shard_kind(attack, world_size()), config.shard_size, this.device)
        export = this.folder / "model" if config.save_model else None
        attack_model(flags, batches, evaluation, tokenizer, mesh, one, identity=identity, export=export)


def attack_folder(folder: Path, subject: str, attack: Attack) -> Path:
    """Where one attack of a grid keeps its files."""
    return folder / "attacks" / subject / attack.name


def _write(config: TamperConfig, folder: Path, reference: Any, warnings: list[str]) -> None:
    """Write attack.json and the picture, and print the table."""
    from evals.attack_results import Curves, results, table
    from evals.fine_tuning import CURVE
    from unlearn.files import write_json

    attacks = {attack.name: attack for attack in config.attacks()}
    curves = {
        subject.name: {
            name: json.loads((attack_folder(folder, subject.name, attack) / CURVE).read_text(encoding="utf-8"))
            for name, attack in attacks.items()
        }
        for subject in config.subjects()
    }
    found = Curves(config, attacks, curves)
    written = results(dataclasses.asdict(config), found, reference, warnings)
    write_json(folder / "attack.json", written)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'unlearn[report]')")
    else:
        _plot(config, found, written, folder / "attack.png")
    for warning in written["warnings"][len(warnings) :]:  # the first were said before the attacks
        print(f"warning: {warning}")
    print(f"{table(found, reference)}\nattack: {folder / 'attack.json'}")


def _plot(config: TamperConfig, curves: Any, written: Mapping[str, Any], path: Path) -> None:
    from evals.attack_plot import plot_attack, plot_grid

    if len(config.attacks()) == 1 and not config.control:
        shown = [task for task in config.eval_tasks if task in written["points"][0]["tasks"]]
        plot_attack(written["points"], list(dict.fromkeys([*written["hazard"], *shown])), path)
    else:
        plot_grid(curves, path)


if __name__ == "__main__":
    run_command("evals/tamper.py", main)
