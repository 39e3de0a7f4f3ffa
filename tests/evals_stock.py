"""lm-eval's own tasks on local files, to compare with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from lm_eval.api.task import ConfigurableTask

from unlearn.evals.harness.task_loader import FEWSHOT_SEED, _manager


def stock_tasks(
    folder: Path, names: Sequence[str], *, include_path: Path | None = None, shots: int | None = None
) -> dict[str, Any]:
    """What lm-eval's evaluator takes: tasks of its own class, which read `folder` laid out as for --data-dir."""

    class Stock(ConfigurableTask):
        def __init__(self, config: dict[str, Any]):
            given = config.get("num_fewshot")
            wanted = {"num_fewshot": (shots or 0) if given is None else given}
            super().__init__(config={key: value for key, value in config.items() if key != "class"} | wanted)
            self.set_fewshot_seed(FEWSHOT_SEED)

        def download(self, dataset_kwargs: Any = None, **_: Any) -> None:
            place = folder / str(self.DATASET_PATH) / (self.DATASET_NAME or "")
            files = {file.name.split("-")[0]: file for file in place.glob("*.parquet")}
            splits = [
                self.config.training_split,
                self.config.validation_split,
                self.config.test_split,
                self.fewshot_cfg.split,
            ]
            self.dataset = {split: datasets.Dataset.from_dict({}) for split in splits if split}
            self.dataset |= {split: datasets.Dataset(pyarrow.parquet.read_table(file)) for split, file in files.items()}

    manager = _manager(list(names), include_path)
    built = [
        manager._factory.build(manager.task_index[name], overrides={"class": Stock}, registry=manager.task_index)
        for name in names
    ]
    return dict(manager.load(built))
