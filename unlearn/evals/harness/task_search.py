"""Find lm-eval's tasks by name without parsing its 14,000 YAML files, which takes 8 seconds."""

import re
from collections.abc import Iterable
from pathlib import Path

import lm_eval.tasks
import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from unlearn.errors import UserError

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
# What the project measures with.
QUICK_FOLDERS = [LM_EVAL_TASKS / "wmdp", LM_EVAL_TASKS / "mmlu" / "default", LM_EVAL_TASKS / "wikitext"]

_DEFINED = re.compile(rb"^[\"']?(task|group|tag)[\"']?\s*:\s*[\"']?([\w.+-]+)", re.MULTILINE)


def check_yaml(folder: Path) -> None:
    """Raise `UserError` for a file that lm-eval would skip without a word, and then call its tasks unknown."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, OSError, UnicodeDecodeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"expected a task definition in {path}; found {reason!r}: mend the file, or move it"
            ) from error


class TaskSearch:
    """One reading of lm-eval's YAML files, as text.

    Attributes:
        defined: the folders with a file that defines a name as a task or group.
        names: all names of tasks, groups and tags, but for tags written as lists.
    """

    def __init__(self) -> None:
        self.defined: dict[str, list[Path]] = {}
        self.names: set[str] = set()
        self._files = [(path.parent, path.read_bytes()) for path in LM_EVAL_TASKS.rglob("*.yaml")]
        for folder, content in self._files:
            for kind, name in _DEFINED.findall(content):
                self.names.add(name.decode())
                if kind != b"tag":
                    self.defined.setdefault(name.decode(), []).append(folder)

    def folders(self, names: Iterable[str]) -> list[Path] | None:
        """The folders that define these tasks and groups; None if one is defined in none or in several.

        Tags are: lm-eval then needs all files that bear the tag, and would take those of one folder for all.
        """
        places = [self.defined.get(name, []) for name in names]
        return [place for (place,) in places] if all(len(found) == 1 for found in places) else None

    def mentions(self, name: str) -> bool:
        """Whether any file has the name as a word: what no file mentions is no task."""
        word = re.compile(rb"(?<![\w.+-])" + re.escape(name.encode()) + rb"(?![\w.+-])")
        return any(word.search(content) for _, content in self._files)
