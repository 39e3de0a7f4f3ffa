"""From task names to lm-eval tasks with their requests built: lm-eval's own templates, on local data where given."""

import difflib
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from evals.local_data import LocalData
from unlearn.errors import UserError

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
# Scanning all of lm-eval's task folders takes 8 s; these are what the project measures with, and take 0.1 s.
QUICK_FOLDERS = [LM_EVAL_TASKS / "wmdp", LM_EVAL_TASKS / "mmlu" / "default"]
OWN_FOLDER = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # lm-eval's default
# `dataset_path`s that are file formats, with the files named in the task's own YAML
FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})


class QuestionTask(ConfigurableTask):
    """A YAML task of lm-eval that reads local files, and builds its requests once.

    Attributes:
        local: where the data are; None asks the hub.
        provenance: what was read: SHA-256 by file, or the fingerprint of what came from the hub by split.
    """

    local: LocalData | None = None

    def __init__(self, config: dict[str, Any]):
        self.provenance: dict[str, str] = {}
        self._built: tuple[int | None, list[Instance]] | None = None
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Fill `self.dataset` with the splits that the task names.

        Raises:
            UserError: a split is missing locally, or the hub cannot be reached.
        """
        if self.local is None or self.config.custom_dataset is not None or self.DATASET_PATH in FORMATS:
            self._read_hub(dataset_kwargs)
            return
        assert self.DATASET_PATH is not None, "a YAML task names a dataset_path"
        questions = self.config.test_split or self.config.validation_split
        examples = [self.config.training_split, self.config.validation_split, self.fewshot_cfg.split]
        self.dataset = {}
        for split in dict.fromkeys(split for split in [questions, *examples] if split):
            # Without few-shot examples their split need not be there, though lm-eval opens it.
            needless = split != questions and not self.config.num_fewshot
            if needless and not self.local.files(self.DATASET_PATH, self.DATASET_NAME, split):
                self.dataset[split] = datasets.Dataset.from_dict({})
                continue
            self.dataset[split], digests = self.local.read(self.DATASET_PATH, self.DATASET_NAME, split)
            self.provenance.update(digests)

    def _read_hub(self, dataset_kwargs: dict[str, Any] | None) -> None:
        try:
            super().download(dataset_kwargs)
        except (OSError, ValueError) as error:
            name = "/".join(part for part in (self.DATASET_PATH, self.DATASET_NAME) if part)
            raise UserError(
                f"expected the data set {name} of task {self.config.task} on the Hugging Face hub or in its cache; "
                f"found {type(error).__name__}: connect to the network, or give --data-dir with "
                f"DIR/{name}/<split>-*.parquet"
            ) from error
        self.provenance = {split: getattr(rows, "_fingerprint", "unknown") for split, rows in self.dataset.items()}

    def build_all_requests(self, *, limit: int | None = None, **kwargs: Any) -> None:
        """Fill `self.instances` with the first `limit` questions, without answers; the second time at no cost.

        lm-eval's own version draws a progress bar per task and rank. Its other arguments (ranks, chat templates,
        system prompts, caches) stay at their defaults in this project.
        """
        if self._built is None or self._built[0] != limit:
            self._built = (limit, list(self._build(limit)))
        self._instances = self._built[1]
        for instance in self._instances:
            instance.resps, instance.filtered_resps = [], {}

    def _build(self, limit: int | None) -> Iterator[Instance]:
        for number, document in self.doc_iterator(limit=limit):
            context = self.fewshot_context(document, self.config.num_fewshot, gen_prefix=self.doc_to_prefix(document))
            metadata = (self.config.task, number, self.config.repeats)
            yield from self.construct_requests(doc=document, ctx=context, metadata=metadata)


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Resolve task, group and tag names.

    Args:
        names: what lm-eval calls them, e.g. `wmdp_bio`, `mmlu_stem`.
        data_dir: folder for *all* data; None reads the hub or its cache.
        include_path: folder with further task YAML files, which win over others of the same name.

    Returns:
        lm-eval's task dictionary: `tasks`, `groups`, `group_map`.

    Raises:
        UserError: no or unknown tasks, a task of a kind that is not multiple choice, one asked for twice, missing data.
    """
    if not names:
        raise UserError("expected at least one name after --tasks; found none: try wmdp_bio mmlu_stem")
    manager = _manager(list(names), include_path)
    local = LocalData(data_dir) if data_dir is not None else None
    kind = type("QuestionTask", (QuestionTask,), {"local": local})
    built: list[Any] = []
    for name in dict.fromkeys(names):
        one = manager._factory.build(manager.task_index[name], overrides={"class": kind}, registry=manager.task_index)
        built.extend(one if isinstance(one, list) else [one])
    loaded = _collect(manager, built)
    for task in loaded["tasks"].values():
        _check_type(task)
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def _manager(names: list[str], include_path: str | Path | None) -> TaskManager:
    """A task manager that knows all `names`: a quick one if possible, else one with everything that lm-eval ships."""
    folders = [OWN_FOLDER]
    if include_path is not None:
        folders.append(Path(include_path).expanduser())
        if not folders[-1].is_dir():
            raise UserError(f"expected a folder after --include-path; found none at {include_path}: check the path")
    manager = TaskManager(include_defaults=False, include_path=[*QUICK_FOLDERS, *folders])
    if _unknown(names, manager.task_index):
        manager = TaskManager(include_defaults=True, include_path=list(folders))
    for name in _unknown(names, manager.task_index):
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "give its folder with --include-path"
        raise UserError(f"expected the name of a task, group or tag; found {name!r}, which is unknown: {hint}")
    for name in names:
        _refuse_classes(name, manager.task_index)
    return manager


def _members(entry: Entry) -> list[str]:
    """The names that a group or tag stands for; none for a task."""
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") if entry.kind is Kind.GROUP else None
    items = listed if isinstance(listed, list) else []
    return [item if isinstance(item, str) else item.get("task") or item.get("group") for item in items]


def _unknown(names: list[str], index: dict[str, Entry]) -> list[str]:
    """Which of `names`, or of what they stand for, `index` does not hold."""
    missing = [name for name in names if name not in index]
    for name in names:
        if name in index:
            missing += _unknown(_members(index[name]), index)
    return missing


def _refuse_classes(name: str, index: dict[str, Entry]) -> None:
    """Refuse tasks written as Python classes: they read data in ways of their own."""
    if index[name].kind is Kind.PY_TASK:
        raise UserError(f"expected a task defined in YAML; found {name}, a Python class: write it as YAML")
    for member in _members(index[name]):
        _refuse_classes(member, index)


def _check_type(task: ConfigurableTask) -> None:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UserError(
            f"expected multiple-choice tasks; found {task.config.task}, which is of type {task.OUTPUT_TYPE}: "
            "choose another task"
        )


def _collect(manager: TaskManager, built: list[ConfigurableTask | Group]) -> dict[str, Any]:
    try:
        return dict(manager.load(built))
    except ValueError as error:
        raise UserError(f"expected each task once in --tasks; found {error}: leave one of them out") from error


@contextmanager
def compiled_templates() -> Iterator[None]:
    """Within the block, lm-eval compiles each question template once, and not again for every question."""
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=None)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the instance's; the class's own shows again
