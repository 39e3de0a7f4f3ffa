"""The flags of `evals/run.py`. Nothing here imports torch: `--help` and a wrong flag answer at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn.errors import UserError


@dataclass(frozen=True)
class EvalConfig:
    """Measure a causal language model on multiple-choice tasks with lm-eval's own templates."""

    model: str
    """Folder or Hugging Face hub name of the checkpoint."""

    tasks: tuple[str, ...] = ("wmdp_bio", "mmlu_stem")
    """Names of lm-eval tasks, groups or tags, or of your own from --include-path."""

    data_dir: Path | None = None
    """Folder with all question files, laid out as DIR/<dataset_path>/<dataset_name>/<split>-*.parquet.
    `hf download cais/wmdp --repo-type dataset --local-dir DIR/cais/wmdp` gives that.
    Without it the hub or its cache is asked."""

    include_path: Path | None = None
    """Folder with further task definitions (lm-eval's YAML)."""

    limit: int | None = None
    """Only the first LIMIT questions of each task, for a quick look; None takes all."""

    batch_tokens: int = 16384
    """Tokens of one forward pass on one rank, padding included. Lower it if memory runs out."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights in memory. Logits are computed in float32 in either case."""

    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""

    out: Path | None = None
    """Folder for results_<time>.json and samples_<task>_<time>.jsonl, in a folder named after the model.
    Without it the tables are only printed."""

    overwrite: bool = False
    """Replace results of the same model in --out; without it they are an error."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if not self.tasks:
            raise UserError("expected at least one name after --tasks; found none: try wmdp_bio mmlu_stem")
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"expected --limit above 0; found {self.limit}: leave it out to take all questions")
        if self.batch_tokens <= 0:
            raise UserError(f"expected --batch-tokens above 0; found {self.batch_tokens}: 16384 suits most GPUs")
        if self.overwrite and self.out is None:
            raise UserError("--overwrite has no effect without --out: give --out or leave it out")
