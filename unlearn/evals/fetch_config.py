"""The flags of `python evals/fetch.py`. Nothing here imports torch: `--help` and a wrong flag answer at once."""

from dataclasses import dataclass
from pathlib import Path

from unlearn.config import split_names
from unlearn.errors import UserError

TASKS = (
    "wmdp_bio",
    "wmdp_chem",
    "wmdp_cyber",
    "mmlu",
    "wmdp_bio_robust",
    "wmdp_bio_shortcut",
    "wmdp_bio_cloze_verified",
)


@dataclass(frozen=True)
class FetchConfig:
    """Fetch the question files of tasks into one folder for --data-dir, on a machine with network, and check them."""

    data_dir: Path
    """Folder for the question files, laid out as DIR/<dataset_path>/<dataset_name>/<split>-*.parquet."""

    tasks: tuple[str, ...] = TASKS
    """Names of lm-eval tasks, groups or tags, also with commas between."""

    include_path: Path | None = None
    """Folder with further task definitions (lm-eval's YAML)."""

    check: bool = False
    """Only check what is there, without network."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(split_names(self.tasks)))
        if not self.tasks:
            raise UserError("expected at least one name after --tasks; found none: leave it out to fetch all")
