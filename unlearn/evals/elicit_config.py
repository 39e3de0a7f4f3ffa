"""The flags of `evals/elicit.py`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from unlearn.config import DeviceFlags, check_once, split_names
from unlearn.config_file import FileFlags
from unlearn.errors import UserError
from unlearn.flags import flag, settle


@dataclass(frozen=True, kw_only=True)
class ElicitConfig(DeviceFlags, FileFlags):
    """Look for what a model still knows without training it: weights rounded to 8 and 4 bits, pruned, or moved back
    towards the original; questions in other words, and with examples before them; a tuned lens and a linear probe on
    the residual stream."""

    model: str
    """Folder or hub name of the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    original: str | None = None
    """The model before unlearning, to be moved towards. Without it that way is left out."""
    output: str
    """Folder for elicit.json and table.md."""
    overwrite: bool = False
    """Replace what an earlier look has left in --output."""
    tasks: tuple[str, ...]
    """lm-eval tasks to ask, each way; also with commas between."""
    data_dir: str | None = None
    """Local data of the tasks, DIR/cais/wmdp/wmdp-bio/test-*.parquet; default: the hub."""
    include_path: str | None = None
    """Folder with further lm-eval task definitions."""
    limit: int | None = flag(least=1)
    """Ask only the first N questions of each task."""
    subsample: int | None = flag(least=1)
    """Ask only N questions of each of --tasks, shared out among its subjects, the same ones every time."""
    num_fewshot: int = flag(0, least=0)
    """Examples before each question, in a way of its own, for tasks whose definition does not fix them at none (WMDP's
    does). 0 leaves that way out."""
    wordings: bool = True
    """Also ask the same questions in three other prompts: told that an expert answers, asked twice, in a dialogue."""
    paraphrases: str | None = None
    """Folder like --data-dir with the same questions in other words and in the same order, a way of its own. Where
    the questions have a column `fact`, it has to agree row by row."""
    lens: str | None = None
    """Tuned lens that was fitted to --model itself (`python -m unlearn fit-lens`), to answer from each layer by."""
    layers: tuple[int, ...] = ()
    """Layers at which the probe reads the residual stream. Default: all."""
    seed: int = flag(0, least=0)
    """Of the probe's folds and of its control."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights in memory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(split_names(self.tasks)))
        check_once("--tasks", self.tasks)
        settle(self)
        if not self.tasks:
            raise UserError("expected at least one name after --tasks; found none: try wmdp_bio")
        if self.limit is not None and self.subsample is not None:
            raise UserError("--limit has no effect beside --subsample: give one of them")
        if self.paraphrases is not None and self.data_dir is None:
            raise UserError("expected --data-dir beside --paraphrases, whose questions they paraphrase; found none")
