"""What is wrong with a task's YAML or its data, in a sentence: lm-eval would go on with a prompt that makes no sense,
or fail inside one of its templates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
import lm_eval.utils
from datasets.exceptions import DatasetsError

from unlearn.errors import UserError

# What templates, Python functions named in a YAML, and lm-eval's own checks of both raise.
TASK_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, SyntaxError, TypeError, ValueError),
    *(OSError, DatasetsError, jinja2.TemplateError),
)


@contextmanager
def explained(expected: str, columns: Callable[[], Iterable[str]] = tuple) -> Iterator[None]:
    """Turn what a task's definition raises within the block into a sentence.

    Args:
        expected: what the block does, to follow "expected".
        columns: of the question, to be named.

    Raises:
        UserError: in place of any of `TASK_ERRORS`; one raised in the block stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except TASK_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        listed = ", ".join(columns())
        named = f" ({listed})" if listed else ""
        raise UserError(
            f"expected {expected}; found {type(error).__name__}: {reason}: mend the data's columns{named} or the "
            "task's YAML"
        ) from error


class _Strict(jinja2.Environment):
    """Templates in which only texts and numbers are written out, and only lists have a first or second item."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and isinstance(argument, int):
            raise TypeError(f"item {argument} of a text ({_short(obj)}) where the template means a list")
        return super().getitem(obj, argument)


def _written(value: Any) -> Any:
    if isinstance(value, (str, int, float, jinja2.Undefined)):  # what is undefined raises when it is written
        return value
    kind = "nothing" if value is None else f"a {type(value).__name__}"
    raise TypeError(f"{kind} ({_short(value)}) where the template means a text")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class PlainText:
    """Checks that a task's doc_to_text makes text of a question's columns, and not Python's way of writing a list."""

    def __init__(self, config: Any):
        self._template: jinja2.Template | None = None
        self._column: str | None = None
        if not isinstance(config.doc_to_text, str) or config.use_prompt is not None:
            return
        if config.doc_to_text.isidentifier():
            self._column = config.doc_to_text
            return
        known = lm_eval.utils.env
        strict = _Strict(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_written)
        strict.filters.update(known.filters)
        self._template = strict.from_string(config.doc_to_text)

    def check(self, document: Mapping[str, Any]) -> None:
        """Raise one of `TASK_ERRORS` if the question's columns are not of the types that the template means."""
        if self._template is not None:
            self._template.render(**document)
        elif self._column is not None:
            if self._column not in document:
                raise LookupError(f"no column {self._column}, which doc_to_text names")
            _written(document[self._column])
