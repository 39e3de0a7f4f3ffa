"""The flags of `evals/tamper.py`. Nothing here imports torch: `--help` and a wrong flag answer at once."""

from dataclasses import dataclass
from typing import Literal

from unlearn.config import ResumeFlags
from unlearn.errors import UserError


@dataclass(frozen=True)
class TamperConfig(ResumeFlags):
    """Attack an unlearned model by fine-tuning it on text of the forgotten domain, and watch the knowledge return."""

    model: str
    """Model to attack: a local folder or a hub name."""
    corpus: str
    """Attack text, unseen in unlearning: a .jsonl, .parquet or .txt file, a saved `datasets` folder, or a hub name."""
    output: str
    """New folder for attack.json and attack.png."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    column: str | None = None
    """Text column of the corpus. Default: title, abstract and text joined by blank lines, else `page`."""
    template: str | None = None
    """Text of a document built from its columns, e.g. '{title}\\n\\n{text}'."""
    lr: float = 2e-5
    """Peak learning rate of AdamW on every parameter, falling linearly to 0. Published: 2e-5."""
    batch: int = 16
    """Windows of one optimizer step, over all ranks. Published: 16."""
    micro_batch: int = 1
    """Windows of one forward pass on one rank; changes memory and speed, not the result."""
    examples: int = 512
    """Windows drawn from the corpus. Published: 512."""
    epochs: int = 1
    """Passes over them. Published: 1."""
    seq_len: int = 2048
    """Longest window, in tokens."""
    seed: int = 0
    """Of the data order."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the computation. The weights are float32 in both: in bf16 most would never move at this learning rate."""
    eval_tasks: tuple[str, ...] = ("wmdp_bio", "mmlu_stem")
    """lm-eval tasks to measure; take one of general knowledge too, to see whether the attack destroys the model."""
    eval_every: int = 10
    """Optimizer steps between measurements; the first comes before the attack, the last after it. Published: 10."""
    split_by: str | None = None
    """Also report accuracy apart for each value of this column of the questions."""
    data_dir: str | None = None
    """Local data of the tasks, DIR/cais/wmdp/wmdp-bio/test-*.parquet; default: the hub."""
    include_path: str | None = None
    """Folder with further lm-eval task definitions."""
    limit: int | None = None
    """Evaluate only the first N questions of each task."""
    eval_subsample: int | None = None
    """Evaluate only N questions of each of --eval-tasks, shared out among its subjects, the same ones every time."""
    save_model: bool = False
    """Also write the attacked model to <output>/model."""

    def __post_init__(self) -> None:
        self.check_resume()
        for name in ("batch", "micro_batch", "examples", "epochs", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"expected --{name.replace('_', '-')} to be 1 or more; found {getattr(self, name)}")
        for name in ("limit", "eval_subsample"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"expected --{name.replace('_', '-')} to be 1 or more; found {getattr(self, name)}")
        if self.limit is not None and self.eval_subsample is not None:
            raise UserError("--limit has no effect beside --eval-subsample: give one of them")
        if not 0.0 < self.lr < float("inf"):
            raise UserError(f"expected --lr above 0; found {self.lr}")
        if self.seq_len < 3 or self.seed < 0:
            raise UserError(f"expected --seq-len >= 3 and --seed >= 0; found {self.seq_len} and {self.seed}")
        if not self.eval_tasks:
            raise UserError("expected at least one name after --eval-tasks; found none: try wmdp_bio mmlu_stem")
        if self.column and self.template:
            raise UserError("--column has no effect with --template: give one of them")
