"""A run of train.py's flags inside a process: trained, measured on the live model, exported."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from unlearn.assemble import MeshOf, Unlearning, announce, assemble, fill_models
from unlearn.config import TrainConfig
from unlearn.cost import CpuTime, Passes, peak_gib
from unlearn.distributed import TIMEOUT, set_timeout
from unlearn.errors import UserError
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.judge.summary import summarise, write_earned, write_summary
from unlearn.export import export_bytes, finish, read_lens
from unlearn.methods.terms import Hooks, Phase
from unlearn.model import load_config
from unlearn.optim.build import make_schedule, restart
from unlearn.run.checkpoint import Checkpoints
from unlearn.run.folder import RUN
from unlearn.run.log import MetricsLog
from unlearn.run.run import Run, opened_run
from unlearn.run.track import tracked
from unlearn.trainer import train


@dataclass(frozen=True)
class Training:
    """A run, assembled and at its folder: what `opened` gives.

    Attributes:
        run: its folder and checkpoints. evaluation: of the live model; None without --eval-tasks.
        identity: digests of everything that is read.
        wanted: tasks of which every measurement must give an accuracy.
        keeps_answers: every measurement also keeps which questions were answered right.
        left_out: steps of each phase that its stop rule left out.
    """

    unlearning: Unlearning
    run: Run
    evaluation: Evaluation | None
    identity: dict[str, str]
    wanted: Sequence[str]
    keeps_answers: bool = False
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.run.folder

    def finished(self) -> bool:
        """Whether an earlier attempt has finished this very run. Every rank must call it; see `Run.finished`."""
        return self.run.finished(self.identity)

    def train(self) -> None:
        """Train from where an earlier attempt came to, export, and measure what was exported.

        Raises:
            NotFinite: see `trainer.train`. UserError: see `fill_models` and `Run.begin`.
        """
        found, config, folder = self.unlearning, self.unlearning.config, self.folder
        cpu = CpuTime()
        set_timeout(TIMEOUT)  # a run before this one has shortened it for its steps
        fill_models(found)
        self.run.begin(self.identity, found.optimizers, export_bytes(found))
        announce(found)
        with (
            tracked(folder, config.track, config.track_project),
            MetricsLog(folder / "metrics.jsonl", found.steps, config.method) as log,
        ):
            checkpoints = self.run.checkpoints(
                found.model,
                found.optimizers,
                log,
                found.steps,
                extra=lambda: {"left_out": self.left_out, "cpu_seconds": cpu.seconds()},
                state=found.state(),
            )
            progress = checkpoints.resume()
            done, cpu.before = progress.step, progress.extra.get("cpu_seconds", 0.0)
            self.left_out.update(progress.extra.get("left_out", {}))
            if done == 0:
                read_lens(found, folder, "before")
            offset = 0
            for phase in found.phases:
                steps = found.steps_of(phase)
                if done < offset + steps or done == offset:
                    self._train_phase(phase, max(0, done - offset), offset, log, checkpoints)
                offset += steps
            damage = self._damage()  # exporting merges the adapters, without which the original is gone
            finish(found, folder)
            self._measure(found.steps, log)
            self.run.record({"cost": self._passes() | self._spent(log, cpu)} | damage)

    def _damage(self) -> dict[str, dict[str, float]]:
        """With --measure-damage: what the trained model's is, before its weights are rounded for export."""
        budget = self.unlearning.budget
        return {"damage": budget.measure()} if budget is not None and self.unlearning.config.measure_damage else {}

    def _passes(self) -> dict[str, float]:
        """Tokens and arithmetic of all steps that were taken."""
        found, total = self.unlearning, Passes()
        for phase in found.phases:
            for step in range(found.steps_of(phase) - self.left_out.get(phase.name, 0)):
                total += found.passes(phase, step)
        return total.as_numbers()

    def _spent(self, log: MetricsLog, cpu: CpuTime) -> dict[str, float]:
        """Seconds of work, those of all ranks' processors, and the most memory that one has held."""
        peak = peak_gib(self.unlearning.parts.device)
        return {"seconds": log.position()[1], "cpu_seconds": cpu.seconds(), "peak_gib": round(peak, 3)}

    def _train_phase(self, phase: Phase, first: int, offset: int, log: MetricsLog, checkpoints: Checkpoints) -> None:
        """Train a phase, of which `first` steps are done, after `offset` steps of the phases before it."""
        found, config = self.unlearning, self.unlearning.config
        if first == 0:
            phase.begin(found.model)
            for optimizer in found.optimizers.values():
                restart(optimizer)
            if found.budget is not None:
                found.budget.check()
        if found.steps_of(phase) == 0:
            return
        train(
            found.model,
            found.loss_of(phase),
            found.optimizers,
            steps=found.steps_of(phase),
            schedule=make_schedule(config.schedule, found.steps_of(phase), config.warmup_ratio),
            log=log,
            clip=config.clip,
            log_every=config.log_every,
            evaluate=lambda step: self._measure(step, log),
            eval_every=config.eval_every,
            first=first,
            offset=offset,
            phase=phase.name,
            hooks=self._counting(phase),
            checkpoints=checkpoints,
            timeout=timedelta(seconds=config.step_timeout),
        )

    def _counting(self, phase: Phase) -> Hooks:
        """The hooks of a phase; where they end it, the steps that are left out are counted."""
        hooks = self.unlearning.hooks_of(phase)
        if self.unlearning.config.task_budgets:
            hooks = hooks.then(Hooks(stop=self._accuracy_left))
        stop = hooks.stop
        if stop is None:
            return hooks

        def counted(done: int, numbers: dict[str, float]) -> str | None:
            why = stop(done, numbers)
            if why:
                self.left_out[phase.name] = self.unlearning.steps_of(phase) - done
            return why

        return dataclasses.replace(hooks, stop=counted)

    def _accuracy_left(self, done: int, numbers: dict[str, float]) -> str | None:
        """Which task has fallen below its least accuracy, in words; None if none has."""
        tasks = self.unlearning.config.task_budgets
        if done % self.unlearning.config.stop_every:
            return None
        assert self.evaluation is not None, "the tasks are among --eval-tasks"
        with self.unlearning.precision():
            result = self.evaluation.run(self.unlearning.model, name=f"{self.unlearning.config.model} in training")
        summary = summarise(result)
        found = {name: float(summary[name]["acc"]) for name in tasks}
        numbers |= {f"{name}/acc": accuracy for name, accuracy in found.items()}
        low = [name for name, accuracy in found.items() if accuracy < tasks[name]]
        return f"--stop-at {low[0]}={tasks[low[0]]:g}: {found[low[0]]:.6g}" if low else None

    def finish(self) -> None:
        """Everything is written."""
        self.run.finish()

    def _measure(self, step: int, log: MetricsLog) -> None:
        """Measure the live model; write evals/step-N.json and a line of the log."""
        if self.evaluation is None:
            return
        found, taken = self.unlearning, step - sum(self.left_out.values())
        with found.precision():
            result = self.evaluation.run(found.model, name=f"{found.config.model} after {taken} steps")
        written = write_summary(result, measurement(self.folder, step), found.config.split_by)
        log.write({"step": step, **written})
        if self.keeps_answers:
            write_earned(result, answers_file(self.folder, step), found.config.split_by)
        missing = [task for task in self.wanted if f"{task}/acc" not in written]
        if missing:
            others = ", ".join([name.removesuffix("/acc") for name in written][:6])
            raise UserError(
                f"expected an accuracy of {missing[0]}; found accuracies of {others}: name others with "
                "--hazard-tasks and --general-tasks"
            )


def measurement(folder: Path, step: int) -> Path:
    """The file of a run's measurement after `step` optimizer steps."""
    return folder / "evals" / f"step-{step:06d}.json"


def answers_file(folder: Path, step: int) -> Path:
    """The file of what each question earned in a run's measurement after `step` optimizer steps."""
    return folder / "evals" / f"answers-{step:06d}.json"


@contextmanager
def opened(
    config: TrainConfig,
    device: torch.device,
    *,
    evaluation: Evaluation | None = None,
    mesh_of: MeshOf | None = None,
    marker: Path | None = None,
    own: frozenset[str] = RUN,
    wanted: Sequence[str] = (),
    keeps_answers: bool = False,
) -> Iterator[Training]:
    """Take a run's folder for the length of the block, and read all that it needs but weights.

    Args:
        evaluation: of the same flags, if there is one already. mesh_of: see `assemble`. marker, own: see `opened_run`.
        wanted, keeps_answers: see `Training`.

    Raises:
        UserError: a mistake in what the flags name; the folder is not for this run.
    """
    inputs = (config.model, getattr(config, "lens", None), config.forget, config.retain)
    with opened_run(config, str(config.output), own, inputs, device, marker=marker) as run:
        found = assemble(config, device, mesh_of)
        if config.eval_tasks and evaluation is None:  # before the first step, so that a wrong name costs no training
            model_config = load_config(config.model, revision=config.revision)
            evaluation = Evaluation.of(config, found.tokenizer, model_config)
        questions = {} if evaluation is None else {"questions": evaluation.sha256()}
        yield Training(found, run, evaluation, found.identity | questions, wanted, keeps_answers)
