"""One fine-tuning attack on one model: what it trains on, the training, and the accuracies on the way."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.evaluation import Evaluation
from evals.summary import summarise
from evals.tamper_config import Attack, Data, Schedule, Subject, TamperConfig
from unlearn.attempt import Attempt
from unlearn.building import precision, trained_model
from unlearn.config import ResumeFlags
from unlearn.data import Batches, Corpus, check_examples
from unlearn.distributed import TIMEOUT, fail_together, is_main, set_timeout
from unlearn.errors import NotFinite, UserError
from unlearn.files import write_json
from unlearn.lora import initial_adapters, merge_lora
from unlearn.methods.retain import prediction
from unlearn.methods.terms import Loss, Term
from unlearn.metrics import MetricsLog
from unlearn.model import fresh_weights, save_model
from unlearn.optim.build import build_optimizers, make_schedule
from unlearn.seeding import generator
from unlearn.trainer import train
from unlearn.weights import Checkpoint, fill, shared_folder

CURVE = "curve.json"  # of a finished attack, in its own folder
CLIP = 1.0  # largest norm of the whole gradient


@dataclass(frozen=True, kw_only=True)
class AttackFlags(ResumeFlags):
    """Everything that one attack on one model depends on: the config.json of its folder. Names as in `TamperConfig`."""

    subject: str
    model: str
    revision: str | None
    random: bool
    corpus: str | None
    column: str | None
    template: str | None
    benign_corpus: str | None
    benign_column: str | None
    benign_template: str | None
    lora_rank: int
    lora_alpha: float | None
    lora_targets: tuple[str, ...]
    lr: float
    schedule: Schedule
    warmup_ratio: float
    data: Data
    examples: int
    epochs: int
    steps: int | None
    batch: int
    micro_batch: int
    seq_len: int
    seed: int
    dtype: Literal["bf16", "fp32"]
    eval_tasks: tuple[str, ...]
    hazard_tasks: tuple[str, ...]
    general_tasks: tuple[str, ...]
    eval_every: int
    split_by: str | None
    limit: int | None
    eval_subsample: int | None
    checkpoint_activations: bool

    @classmethod
    def of(cls, config: TamperConfig, subject: Subject, attack: Attack) -> "AttackFlags":
        """The flags of one attack of the grid, which goes on whenever the grid does."""
        shared = {name: getattr(config, name) for name in _names(cls) if name in _names(TamperConfig)}
        hazard, general = config.roles()
        own: dict[str, Any] = {
            "subject": subject.name,
            "model": subject.model,
            "revision": subject.revision,
            "random": subject.random,
            "lora_alpha": (config.lora_alpha or 16.0) if attack.lora_rank else None,
            "hazard_tasks": tuple(hazard),
            "general_tasks": tuple(general),
            "overwrite": False,
            "resume": "auto",
        }
        return cls(**(shared | dataclasses.asdict(attack) | own))

    @property
    def lora_dropout(self) -> float:
        """None in an attack."""
        return 0.0

    @property
    def compile_blocks(self) -> bool:
        """Not in an attack, whose windows differ in length."""
        return False


def _names(flags: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(flags)}


def attack_batches(flags: AttackFlags, corpora: Mapping[str, Corpus]) -> Batches:
    """The global batches of an attack.

    Args:
        corpora: `forget` and `benign`, those that the data of the attack need.

    Raises:
        UserError: there are fewer windows, or windows a batch, than ranks.
    """
    corpus = corpora[flags.data] if flags.data != "mix" else _mix(corpora, flags.examples, flags.seed)
    unique = min(flags.examples, len(corpus.windows))
    batch = min(flags.batch, unique)
    check_examples(corpus, flags.examples, batch)
    return Batches(
        corpus,
        examples=flags.examples,
        total=unique * flags.epochs if flags.steps is None else batch * flags.steps,
        batch=batch,
        seed=flags.seed,
        tag="attack",
        micro_batch=flags.micro_batch,
    )


def _mix(corpora: Mapping[str, Corpus], examples: int, seed: int) -> Corpus:
    """As many windows of either corpus, `examples` of both: of each the first ones that it alone would give."""
    parts = [corpora["forget"], corpora["benign"]]
    half = min(examples // 2, *(len(part.windows) for part in parts))
    orders = [torch.randperm(len(part.windows), generator=generator(seed, "attack", "choice")) for part in parts]
    windows = [part.windows[i] for part, order in zip(parts, orders, strict=True) for i in order[:half].tolist()]
    name = " and ".join(part.name for part in parts)
    return Corpus(name, documents=sum(part.documents for part in parts), windows=windows)


def check_examples_differ(batches: Mapping[Attack, Batches]) -> None:
    """Raise `UserError` if two attacks of a grid differ in --examples alone, and draw the same windows all the same."""
    seen: dict[tuple[Any, ...], Attack] = {}
    for attack, found in batches.items():
        key = (*(value for name, value in dataclasses.asdict(attack).items() if name != "examples"), found.chosen)
        if key in seen:
            raise UserError(
                f"expected --examples that draw different windows; found {seen[key].examples} and {attack.examples}, "
                f"both {found.chosen} of --data {attack.data}: leave one out, or use a larger corpus"
            )
        seen[key] = attack


def attack_model(
    flags: AttackFlags,
    batches: Batches,
    evaluation: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    mesh: DeviceMesh | None,
    this: Attempt,
    *,
    identity: Mapping[str, str],
    export: Path | None,
) -> None:
    """Fine-tune from where an earlier attempt came to, measure on the way, and write curve.json.

    An attack that diverges is a result: curve.json then has its reason, and the points up to there.

    Args:
        mesh: to shard over, None to replicate. identity: digests of what is read.
        export: where to write the attacked model, if anywhere.
    """
    set_timeout(TIMEOUT)  # an attack before this one has shortened it for its steps
    model = _load(flags, mesh, this.device)
    computing = precision(flags, mesh, this.device)
    optimizers = build_optimizers(model, optimizer="adamw", adam_lr=flags.lr)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    this.claim(identity, optimizers, size if export is not None else 0)
    if is_main():
        print(_description(flags, batches), flush=True)
    course = _Course(evaluation, model, batches, computing, flags)
    with MetricsLog(this.folder / "metrics.jsonl", batches.steps, f"attacking {flags.subject}") as log:
        checkpoints = this.checkpoints(model, optimizers, log, batches.steps, lambda: {"points": course.points})
        progress = checkpoints.resume()
        course.points += progress.extra.get("points", [])
        reason = None
        try:
            train(
                model,
                Loss([Term("text", batches, prediction(model))], computing),
                optimizers,
                steps=batches.steps,
                schedule=make_schedule(flags.schedule, batches.steps, flags.warmup_ratio),
                log=log,
                clip=CLIP,
                evaluate=course.measure,
                eval_every=flags.eval_every,
                first=progress.step,
                checkpoints=checkpoints,
                timeout=timedelta(seconds=flags.step_timeout),
            )
            course.measure(batches.steps)
        except NotFinite as error:
            if not course.points:
                raise  # of the model as it came
            this.stop.obey()  # the next attack would not know of a signal that came in these steps
            reason = str(error)
    if export is not None and reason is None:
        _export(model, tokenizer, export)
    with fail_together():
        if is_main():
            write_json(this.folder / CURVE, _curve(batches, course.points, reason))
    this.finish()


def _load(flags: AttackFlags, mesh: DeviceMesh | None, device: torch.device) -> PreTrainedModel:
    """The model in training, on `device`, with its weights or, for the random control, fresh ones."""
    model = trained_model(flags, mesh)
    sources: list[Callable[[str], Tensor | None]] = [initial_adapters(model)]
    if flags.random:
        fresh = fresh_weights(flags.model, flags.seed, revision=flags.revision)
        sources.append(lambda name: fresh(name.replace(".base.", ".")))
    with fail_together():
        checkpoint = Checkpoint.open(flags.model, revision=flags.revision)
        fill(model, checkpoint, device, initial=lambda name: _first(source(name) for source in sources))
    return model


def _first(values: Iterable[Tensor | None]) -> Tensor | None:
    return next((value for value in values if value is not None), None)


class _Course:
    """The measurements of one attack: accuracies with the steps and the tokens that they took."""

    def __init__(
        self,
        evaluation: Evaluation,
        model: PreTrainedModel,
        batches: Batches,
        precision: Callable[[], AbstractContextManager[object]],
        flags: AttackFlags,
    ):
        self._evaluation, self._model, self._precision, self._flags = evaluation, model, precision, flags
        self._tokens = [0, *accumulate(map(batches.tokens, range(batches.steps)))]
        self.points: list[dict[str, Any]] = []

    def measure(self, step: int) -> None:
        """Add the point after `step` optimizer steps.

        Raises:
            NotFinite: the model gives no numbers any more. UserError: a hazard or general task has no accuracy.
        """
        with self._precision():
            result = self._evaluation.run(self._model, name=self._flags.model)
        tasks = summarise(result, self._flags.split_by)
        missing = [task for task in (*self._flags.hazard_tasks, *self._flags.general_tasks) if task not in tasks]
        if missing:
            raise UserError(
                f"expected an accuracy of {missing[0]}; found accuracies of {', '.join(list(tasks)[:6])}: name others "
                "with --hazard-tasks and --general-tasks"
            )
        self.points.append({"step": step, "tokens": self._tokens[step], "tasks": tasks})


def _description(flags: AttackFlags, batches: Batches) -> str:
    tuning = f"LoRA rank {flags.lora_rank}" if flags.lora_rank else "full"
    return (
        f"attack on {flags.subject}: {tuning}, learning rate {flags.lr}, {flags.schedule}, {flags.data} text; unique "
        f"examples {batches.unique:,}, windows trained on {batches.total:,}, effective epochs "
        f"{batches.total / batches.unique:.2f}, optimizer steps {batches.steps:,} of global batch {batches.batch}"
    )


def _export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    merge_lora(model)
    with shared_folder(folder, replace=True) as temporary:
        save_model(model, tokenizer, temporary)


def _curve(batches: Batches, points: Sequence[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    """What curve.json holds; `diverged` is the reason, None for an attack that came to its end."""
    return {
        "steps": batches.steps,
        "unique": batches.unique,
        "batch": batches.batch,
        "tokens": sum(map(batches.tokens, range(batches.steps))),
        "diverged": reason,
        "points": list(points),
    }
