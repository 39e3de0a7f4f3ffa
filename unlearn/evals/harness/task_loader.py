"""From task names to lm-eval tasks with their requests built: lm-eval's own templates, on local data where given."""

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.utils
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from unlearn.config import split_names
from unlearn.errors import UserError
from unlearn.evals.harness.local_data import LocalData
from unlearn.evals.harness.question_task import FORMATS, QuestionTask, allocate
from unlearn.evals.harness.task_errors import explained
from unlearn.evals.harness.task_search import QUICK_FOLDERS, TaskSearch, check_yaml

OWN_FOLDER = Path(__file__).parent.parent / "tasks"
FEWSHOT_SEED = 1234  # lm-eval's default
SUPPORTED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    subsample: int | None = None,
    permute: bool = False,
    shots: int | None = None,
) -> dict[str, Any]:
    """Resolve task, group and tag names, and choose their questions.

    Args:
        names: what lm-eval calls them, e.g. `wmdp_bio`, `mmlu_stem`; one word may hold several with commas between.
        data_dir: folder for *all* data; None reads the hub or its cache.
        include_path: folder with further task YAML files, which win over others of the same name.
        limit: only the first so many questions of each task.
        subsample: so many questions of each of `names`, shared out among its subjects and always the same.
        permute: ask questions with letters in every cyclic order of their choices.
        shots: few-shot examples before each question, but for tasks whose own YAML says that there are none.

    Returns:
        lm-eval's task dictionary: `tasks`, `groups`, `group_map`.

    Raises:
        UserError: no or unknown tasks, a task of an unsupported kind, one asked for in two ways, missing data, no
            questions, nothing to permute, no task that takes `shots`.
    """
    names = split_names(names)
    if not names:
        raise UserError("expected at least one name after --tasks; found none: try wmdp_bio mmlu_stem")
    manager = _manager(names, include_path)
    local = LocalData(data_dir) if data_dir is not None else None
    kind = type("QuestionTask", (QuestionTask,), {"local": local, "shots": shots})
    loaded = _collect(_build(names, manager, kind), once=subsample is not None)
    tasks: dict[str, QuestionTask] = loaded["tasks"]
    for task in tasks.values():
        _check_type(task)
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    if shots and all(task.config.num_fewshot == 0 for task in tasks.values()):
        raise UserError(
            "expected a task that takes examples for --num-fewshot; found only tasks whose definition says "
            "num_fewshot: 0, such as WMDP's: leave it out"
        )
    sizes = _subsample(names, manager.task_index, tasks, subsample) if subsample is not None else {}
    for name, task in tasks.items():
        task.select(limit=limit, subsample=sizes.get(name), permute=permute)
    for group in loaded["groups"].values():
        _check_weights(group, tasks)
    if permute and all(task.orders == 1 for task in tasks.values()):
        raise UserError(
            "expected a task with letters in the prompt for --permute-choices; found none: leave it out, or add one "
            "such as wmdp_bio to --tasks"
        )
    return loaded


def _build(names: Sequence[str], manager: TaskManager, kind: type[QuestionTask]) -> list[QuestionTask | Group]:
    """What lm-eval makes of each name, with tasks of our kind."""
    built: list[QuestionTask | Group] = []
    for name in dict.fromkeys(names):
        with explained(f"a definition of {name} that lm-eval can read"):
            one = manager._factory.build(
                manager.task_index[name], overrides={"class": kind}, registry=manager.task_index
            )
        built.extend(one if isinstance(one, list) else [one])
    return built


def question_sources(names: Sequence[str], include_path: str | Path | None = None) -> list[tuple[str, str | None, str]]:
    """The (data set, configuration, split) of every file with questions, or few-shot examples, of these tasks.

    A split for examples counts unless the task's definition says that there are none: --num-fewshot may ask for some.

    Raises:
        UserError: an unknown task.
    """
    names = split_names(names)
    manager = _manager(names, include_path)
    found = []
    for leaf in dict.fromkeys(leaf for name in names for leaf in _leaves(name, manager.task_index)):
        config = manager._factory._load_full_config(manager.task_index[leaf], None)
        if config["dataset_path"] in FORMATS:  # the YAML itself names the files
            continue
        splits = [config.get("test_split") or config.get("validation_split")]
        shots, own = config.get("num_fewshot"), config.get("fewshot_split")
        if shots != 0:
            splits.append(own or (shots and (config.get("training_split") or config.get("validation_split"))))
        found += [(config["dataset_path"], config.get("dataset_name"), split) for split in splits if split]
    return list(dict.fromkeys(found))


def _subsample(
    names: Sequence[str], index: dict[str, Entry], tasks: Mapping[str, QuestionTask], total: int
) -> dict[str, int]:
    """How many questions of each task to ask, for `total` of each of `names`."""
    given: dict[str, int] = {}
    for name in dict.fromkeys(names):
        sizes = {leaf: len(tasks[leaf].eval_docs) for leaf in _leaves(name, index) if leaf in tasks}
        given |= allocate(sizes, total, name)
    return given


def _manager(names: list[str], include_path: str | Path | None) -> TaskManager:
    """A task manager that knows all `names`, of the folders that they need: one of everything takes 8 s to build."""
    folders = [OWN_FOLDER]
    if include_path is not None:
        folders.append(Path(include_path).expanduser())
        if not folders[-1].is_dir():
            raise UserError(f"expected a folder after --include-path; found none at {include_path}: check the path")
        check_yaml(folders[-1])
    manager = TaskManager(include_defaults=False, include_path=[*QUICK_FOLDERS, *folders])
    if _unknown(names, manager.task_index):
        manager = _search(names, folders, manager)
    for name in names:
        _refuse_classes(name, manager.task_index)
    return manager


def _search(names: list[str], folders: list[Path], manager: TaskManager) -> TaskManager:
    """Add the folders of lm-eval that define what `manager` lacks, or everything if they are not that easily told."""
    search, quick = TaskSearch(), list(QUICK_FOLDERS)
    while missing := _unknown(names, manager.task_index):
        for name in missing:
            if not search.mentions(name):
                close = difflib.get_close_matches(name, sorted(search.names | set(manager.all_tasks)), n=3, cutoff=0.5)
                hint = f"did you mean {', '.join(close)}?" if close else "give its folder with --include-path"
                raise UserError(f"expected the name of a task, group or tag; found {name!r}, which is unknown: {hint}")
        places = search.folders(missing)
        if places is None or set(places) <= set(quick):
            return _everything(names, folders)
        quick += [place for place in dict.fromkeys(places) if place not in quick]
        manager = TaskManager(include_defaults=False, include_path=[*quick, *folders])
    return manager


def _everything(names: list[str], folders: list[Path]) -> TaskManager:
    manager = TaskManager(include_defaults=True, include_path=list(folders))
    for name in _unknown(names, manager.task_index):
        raise UserError(
            f"expected the name of a task, group or tag; found {name!r}, which is unknown: `lm-eval ls tasks` lists "
            "lm-eval's, --include-path adds yours"
        )
    return manager


def _members(entry: Entry) -> list[str]:
    """The names that a group or tag stands for; none for a task."""
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") if entry.kind is Kind.GROUP else None
    items = listed if isinstance(listed, list) else []
    return [item if isinstance(item, str) else item.get("task") or item.get("group") for item in items]


def _leaves(name: str, index: dict[str, Entry]) -> list[str]:
    """The tasks that a name stands for."""
    members = _members(index[name])
    return [leaf for member in members for leaf in _leaves(member, index)] if members else [name]


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


def _check_weights(group: Group, tasks: Mapping[str, QuestionTask]) -> None:
    """Refuse groups that are the plain mean over subjects of several sizes: intervals and verdicts count questions."""
    sizes = {task.config.task: len(tasks[task.config.task].eval_docs) for task in group.get_all_tasks()}
    unweighted = any(not one.weight_by_size for one in group.aggregate_metric_list or [])
    if unweighted and len(set(sizes.values())) > 1:
        raise UserError(
            f"expected groups that weigh every question alike; found {group.name}, which takes the plain mean over "
            f"subjects of {min(sizes.values()):,} to {max(sizes.values()):,} questions (weight_by_size: false): name "
            f"its tasks instead ({', '.join(list(sizes)[:3])}, ...)"
        )


def _check_type(task: QuestionTask) -> None:
    if task.OUTPUT_TYPE not in SUPPORTED or task.MULTIMODAL:
        more = " with pictures or sound" if task.MULTIMODAL else ""
        raise UserError(
            f"expected tasks on text of type {', '.join(SUPPORTED)}; found {task.config.task}, which is of type "
            f"{task.OUTPUT_TYPE}{more}: choose another task"
        )


def _collect(built: Sequence[QuestionTask | Group], once: bool) -> dict[str, Any]:
    """lm-eval's task dictionary; a task may be there by itself and in groups, if it is the same everywhere.

    Args:
        once: refuse even that, as so many questions "of each" would not be clear.
    """
    groups = {
        group.name: group for item in built if isinstance(item, Group) for group in [item, *item.get_all_groups()]
    }
    tasks: dict[str, QuestionTask] = {}
    for item in built:
        for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
            known = tasks.setdefault(task.config.task, task)
            if known is not task and (once or _definition(known) != _definition(task)):
                more = " with --subsample" if once else ", or with one definition"
                raise UserError(
                    f"expected each task once in --tasks{more}; found {task.config.task} in two of them: leave one out"
                )
    # Groups find their numbers by the names of their tasks.
    return {"tasks": tasks, "groups": groups, "group_map": {name: group.child_names for name, group in groups.items()}}


def _definition(task: QuestionTask) -> str:
    return repr(task.config.to_dict())


@contextmanager
def compiled_templates() -> Iterator[None]:
    """Within the block, lm-eval compiles each question template once, and not again for every question."""
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=None)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the instance's; the class's own shows again
