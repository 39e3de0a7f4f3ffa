"""The flags of `evals/run.py`. Nothing here imports torch: `--help` and a wrong flag answer at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unlearn.config import DeviceFlags
from unlearn.config_file import FileFlags
from unlearn.errors import UserError
from unlearn.evals.judge.targets import parse_pools, parse_target


@dataclass(frozen=True)
class EvalConfig(DeviceFlags, FileFlags):
    """Measure a causal language model with lm-eval's own templates, and say what the numbers can bear."""

    model: str
    """Folder or Hugging Face hub name of the checkpoint."""

    tasks: tuple[str, ...] = ("wmdp_bio", "mmlu_stem")
    """Names of lm-eval tasks, groups or tags, or of your own from --include-path; also with commas between."""

    pool: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A row over the questions of several tasks, as NAME=TASK,TASK, e.g. --pool bio=mmlu_anatomy,mmlu_virology; NAME
    may stand in --target."""

    num_fewshot: int | None = None
    """Examples before each question, for tasks whose definition does not fix them at none (WMDP's does)."""

    chat_template: bool = False
    """Ask through the tokenizer's own chat template, as lm-eval's --apply_chat_template does with few-shot examples as
    turns: for instruction models. The answers then follow the template without a space."""

    data_dir: Path | None = None
    """Folder with all question files, laid out as DIR/<dataset_path>/<dataset_name>/<split>-*.parquet.
    `python evals/fetch.py --data-dir DIR` prepares it where there is network. Without it the hub or its cache is
    asked."""

    include_path: Path | None = None
    """Folder with further task definitions (lm-eval's YAML)."""

    limit: int | None = None
    """Only the first LIMIT questions of each task, for a quick look; None takes all."""

    subsample: int | None = None
    """Only so many questions of each of --tasks, shared out among its subjects, the same ones every time."""

    permute_choices: bool = False
    """Ask every question with letters in all cyclic orders of its choices (four times the work): no habit of a letter
    survives that. Questions whose choices speak of each other ("A and B", "all of the above") are left out and counted.
    For headline numbers."""

    truncate: bool = False
    """Cut the beginnings off questions that are longer than the model's context, as lm-eval does; without it they are
    an error."""

    metric: str | None = None
    """The metric of lm-eval that is shown, judged and compared, for tasks that have it, e.g. acc_norm. Without it, and
    for the other tasks, the first accuracy of the task's own list."""

    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A bound to judge, e.g. --target 'wmdp_bio_robust<=0.25' --target 'mmlu_stem>=0.34', in quotation marks."""

    baseline: Path | None = None
    """Results of another model on the same questions (results_<time>.json or its folder), to be compared with."""

    margin: float = 0.01
    """Against --baseline: how much worse still counts as not inferior, as a fraction."""

    batch_tokens: int | None = None
    """Tokens of one forward pass on one rank, padding included. Lower it if memory runs out. None chooses by device:
    16,384 on a GPU, 1,024 on a CPU."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights in memory. Logits are computed in float32 in either case."""

    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""

    out: Path | None = None
    """Folder for results_<time>.json, in a folder named after the model. Without it the tables are only printed."""

    samples: bool = False
    """Also write samples_<task>_<time>.jsonl to --out: every prompt with its log-likelihoods."""

    overwrite: bool = False
    """Replace results of the same model in --out; without it they are an error."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if not self.tasks:
            raise UserError("expected at least one name after --tasks; found none: try wmdp_bio mmlu_stem")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(
                f"expected --num-fewshot of 0 or more; found {self.num_fewshot}: leave it out for the task's own"
            )
        parse_pools(self.pool)
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"expected --limit above 0; found {self.limit}: leave it out to take all questions")
        if self.batch_tokens is not None and self.batch_tokens <= 0:
            raise UserError(f"expected --batch-tokens above 0; found {self.batch_tokens}: 16384 suits most GPUs")
        if self.subsample is not None and self.subsample <= 0:
            raise UserError(f"expected --subsample above 0; found {self.subsample}: leave it out to take all questions")
        if self.limit is not None and self.subsample is not None:
            raise UserError("--limit has no effect beside --subsample: give one of them")
        for name in ("overwrite", "samples"):
            if getattr(self, name) and self.out is None:
                raise UserError(f"--{name} has no effect without --out: give --out or leave it out")
        if self.margin != 0.01 and self.baseline is None:
            raise UserError("--margin has no effect without --baseline: give --baseline or leave it out")
        if not 0.0 < self.margin < 1.0:
            raise UserError(f"expected --margin as a fraction between 0 and 1; found {self.margin}: 0.01 is one point")
        for target in self.target:
            parse_target(target)
