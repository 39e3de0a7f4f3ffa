"""A YAML task of lm-eval that reads local files, asks a chosen part of its questions, and builds its requests once."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable, hash_string

from unlearn.errors import UserError
from unlearn.evals.harness.chat import ChatTemplate
from unlearn.evals.harness.choice_orders import check_columns, depends_on_order, in_every_order
from unlearn.evals.harness.local_data import LocalData, read_named
from unlearn.evals.harness.task_errors import PlainText, explained
from unlearn.evals.judge.answers import ACCURACIES, Key, Letters
from unlearn.seeding import derive

# `dataset_path`s that are file formats, with the files named in the task's own YAML, and those that are read here
FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})
READ_HERE = frozenset({"csv", "json", "parquet"})
Document = dict[str, Any]


class Hashes(NamedTuple):
    """SHA-256 of a question, of its first prompt and of its target."""

    doc_hash: str
    prompt_hash: str
    target_hash: str


class QuestionTask(ConfigurableTask):
    """One task.

    Attributes:
        local: where the data are; None asks the hub.
        shots: few-shot examples before each question, unless the YAML says that there are none; None: as it says.
        provenance: what was read: SHA-256 by file, or the fingerprint of what came from the hub by split.
        available: how many questions the data hold.
        orders: in how many cyclic orders of its choices each question is asked.
        chat_template: makes prompts of messages; None asks in plain text. wording: what a prompt then becomes.
        left_out: how many questions were not asked because their choices speak of each other's letters or places.
        keys: what marks each question with choices, once requests were built.
    """

    local: LocalData | None = None
    shots: int | None = None
    MULTIMODAL = False  # lm-eval sets it on tasks with pictures or sound

    def __init__(self, config: dict[str, Any]):
        self.provenance: dict[str, str] = {}
        self._documents: list[Document] | None = None
        self._built: list[Instance] | None = None
        self._hashes: list[Hashes] | None = None
        self._metrics: list[dict[str, Any]] = []
        self.chat_template: ChatTemplate | None = None
        self.wording: Callable[[str], str] | None = None
        self.keys: list[Key] = []
        self.available, self.orders, self.left_out = 0, 1, 0
        with explained(
            f"task {config['task']} to be built from its YAML and its data", lambda: vars(self).get("features", ())
        ):
            super().__init__(config=self._with_shots({key: config[key] for key in config if key != "class"}))

    def _with_shots(self, config: dict[str, Any]) -> dict[str, Any]:
        """As lm-eval has it: `num_fewshot: 0` in a YAML cannot be overridden."""
        return config if self.shots is None or config.get("num_fewshot") == 0 else config | {"num_fewshot": self.shots}

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Fill `self.dataset` with the splits that the task names.

        Raises:
            UserError: a split is missing locally, or the hub cannot be reached.
        """
        if (files := self._named_files(dataset_kwargs or {})) is not None:
            self._read_named(files)
            return
        if self.local is None or self.config.custom_dataset is not None or self.DATASET_PATH in FORMATS:
            self._read_hub(dataset_kwargs)
            return
        assert self.DATASET_PATH is not None, "a YAML task names a dataset_path"
        questions = self.config.test_split or self.config.validation_split
        examples = [self.fewshot_cfg.split, self.config.training_split, self.config.validation_split]
        needed = [questions, next(filter(None, examples), None) if self.config.num_fewshot else None]
        self.dataset = {}
        for split in dict.fromkeys(split for split in [questions, *examples] if split):
            # A split that no few-shot example comes from need not be there, though lm-eval opens it.
            if split not in needed and not self.local.files(self.DATASET_PATH, self.DATASET_NAME, split):
                self.dataset[split] = datasets.Dataset.from_dict({})
                continue
            self.dataset[split], digests = self.local.read(self.DATASET_PATH, self.DATASET_NAME, split)
            self.provenance |= digests if split in needed else {}

    def _named_files(self, kwargs: dict[str, Any]) -> dict[str, list[str]] | None:
        """The local files by split that the YAML names, if they and all that it says of them can be read here."""
        named = kwargs.get("data_files")
        if self.DATASET_PATH not in READ_HERE or not named or set(kwargs) - {"data_files", "trust_remote_code"}:
            return None
        by_split = named if isinstance(named, dict) else {"train": named}
        files = {split: [some] if isinstance(some, str) else list(some) for split, some in by_split.items()}
        return None if any("://" in name for names in files.values() for name in names) else files

    def _read_named(self, files: dict[str, list[str]]) -> None:
        """Fill `self.dataset` with files whose paths start from the YAML's folder, or else from --data-dir or here."""
        source = (self.config.metadata or {}).get("config_source", "")
        folders = [Path(source).parent, *([self.local.root] if self.local is not None else []), Path.cwd()]
        self.dataset = {}
        for split, names in files.items():
            self.dataset[split], digests = read_named(names, folders, str(self.config.task))
            self.provenance.update(digests)

    def _read_hub(self, dataset_kwargs: dict[str, Any] | None) -> None:
        try:
            super().download(dataset_kwargs)
        except RuntimeError as error:
            if "scripts" not in str(error):
                raise
            raise UserError(
                f"expected the data set {self.DATASET_PATH} of task {self.config.task} as files of questions; found a "
                f"script that would make them ({str(error).splitlines()[0]}): give --data-dir with its Parquet files"
            ) from error
        except (OSError, ValueError, DatasetsError) as error:
            name = "/".join(part for part in (self.DATASET_PATH, self.DATASET_NAME) if part)
            raise UserError(
                f"expected the data set {name} of task {self.config.task} on the Hugging Face hub or in its cache; "
                f"found {type(error).__name__}: connect to the network, or give --data-dir with "
                f"DIR/{name}/<split>-*.parquet, which `python evals/fetch.py` prepares"
            ) from error
        self.provenance = {split: getattr(rows, "_fingerprint", "unknown") for split, rows in self.dataset.items()}

    @property
    def letters(self) -> Letters | None:
        """The names of the choices if they are letters that stand in the prompt, the same for every question."""
        names = self.config.doc_to_choice
        if self.OUTPUT_TYPE != "multiple_choice" or not isinstance(names, list) or len(names) < 2:
            return None
        if not all(isinstance(name, str) and len(name) == 1 for name in names):
            return None
        return Letters(tuple(names), self.orders)

    @property
    def metrics(self) -> list[str]:
        """Those of lm-eval's metrics whose mean over the questions it reports."""
        return [name for name, aggregate in self.aggregation().items() if aggregate is mean]

    def metric(self, wanted: str | None) -> str | None:
        """Which metric to report: `wanted` if the task has it, else the first accuracy of its own list."""
        if wanted in self.metrics:
            return wanted
        return next((name for name in self.metrics if name in ACCURACIES), None)

    @property
    def eval_docs(self) -> Any:
        """The questions asked: those of the data, until `select` chose among them."""
        if self._documents is not None:
            return self._documents
        documents = super().eval_docs
        if len(documents) == 0:
            raise UserError(f"expected questions for task {self.config.task}; found none: check its data files")
        return documents

    def select(self, *, limit: int | None = None, subsample: int | None = None, permute: bool = False) -> None:
        """Choose what is asked, before any request is built.

        Args:
            limit: the first so many questions.
            subsample: so many questions, drawn the same way every time: from one number to a higher one some are added.
            permute: ask each question in every cyclic order of its choices, if they are letters in the prompt; those
                whose choices speak of each other are left out.

        Raises:
            UserError: a question lacks the columns that `permute` needs.
        """
        documents = list(self.eval_docs)
        self.available = len(documents)
        letters = self.letters if permute else None
        if letters is not None:
            self.orders = len(letters.names)
            documents = self._leave_out(documents)
        if limit is not None:
            documents = documents[:limit]
        if subsample is not None:
            order = sorted(range(len(documents)), key=lambda index: derive(0, f"question of {self.config.task}", index))
            documents = [documents[index] for index in sorted(order[:subsample])]
        if letters is not None:
            documents = [order for document in documents for order in in_every_order(document)]
        self._documents = documents

    def _leave_out(self, documents: list[Document]) -> list[Document]:
        """Those that mean the same in another order of their choices; the others are counted."""
        for document in documents:
            check_columns(document, self.orders, str(self.config.task))
        kept = [document for document in documents if not depends_on_order(document["choices"])]
        self.left_out = len(documents) - len(kept)
        if not kept:
            raise UserError(
                f"expected questions for --permute-choices in task {self.config.task}; found none whose choices do not "
                "speak of each other's letters or places: leave --permute-choices out"
            )
        return kept

    def build_all_requests(self, **kwargs: Any) -> None:
        """Fill `self.instances` without responses; the second time at no cost.

        lm-eval's own version draws a progress bar per task and rank. Its arguments (limits, ranks, system prompts,
        caches) stay at their defaults in this project; the chat template is the task's attribute.
        """
        if self._built is None:
            self._check_examples()
            self._built = list(self._build())
        self._instances, self._metrics = self._built, []
        for instance in self._instances:
            instance.resps, instance.filtered_resps = [], {}

    def process_results(self, doc: Document, results: Any) -> dict[str, Any]:
        """lm-eval's metrics of one question, remembered for `samples`."""
        metrics: dict[str, Any] = super().process_results(doc, results)
        self._metrics.append(metrics)
        return metrics

    def hashes(self) -> list[Hashes]:
        """The identity of each question as lm-eval's evaluator computes it; once, as it takes longer than all else."""
        if self._hashes is None:
            self._hashes = [
                Hashes(
                    hash_string(json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)),
                    hash_string(requests[0].arguments[0]),
                    hash_string(str(self.doc_to_target(document))),
                )
                for document, requests in zip(self.eval_docs, self.by_question(), strict=True)
            ]
        return self._hashes

    def samples(self) -> list[dict[str, Any]]:
        """The questions as lm-eval's evaluator logs them, after it has run: one entry a filter and question."""
        found = []
        documents, requests, hashes = list(self.eval_docs), self.by_question(), self.hashes()
        for place, name in enumerate(self.instances[0].filtered_resps):
            for number, document in enumerate(documents):
                metrics = self._metrics[place * len(documents) + number]
                found.append(
                    {
                        "doc_id": number,
                        "doc": document,
                        "target": self.doc_to_target(document),
                        "arguments": [request.args for request in requests[number]],
                        "resps": [request.resps for request in requests[number]],
                        "filtered_resps": [request.filtered_resps[name] for request in requests[number]],
                        "filter": name,
                        "metrics": list(metrics),
                        **hashes[number]._asdict(),
                        **metrics,
                    }
                )
        return found

    def by_question(self) -> list[list[Instance]]:
        """The requests of each question, in the order of its choices."""
        groups: dict[int, list[Instance]] = {}
        for instance in self.instances:
            groups.setdefault(instance.doc_id, []).append(instance)
        return [sorted(groups[number], key=lambda instance: instance.idx) for number in range(len(groups))]

    def _build(self) -> Iterator[Instance]:
        self.keys, text = [], PlainText(self.config)
        for number, document in self.doc_iterator():
            with explained(f"question {number} of task {self.config.task} to fill the task's templates", document.keys):
                text.check(document)
                context = self.fewshot_context(
                    document,
                    self.config.num_fewshot,
                    gen_prefix=self.doc_to_prefix(document),
                    apply_chat_template=self.chat_template is not None,
                    fewshot_as_multiturn=True,
                    chat_template=self.chat_template,
                )
                context = context if self.wording is None else self.wording(context)
                if self.OUTPUT_TYPE == "multiple_choice":
                    self.keys.append(self._key(document, number))
                metadata = (self.config.task, number, self.config.repeats)
                requests = self.construct_requests(
                    doc=document, ctx=context, metadata=metadata, apply_chat_template=self.chat_template is not None
                )
                listed = requests if isinstance(requests, list) else [requests]
                if number == 0 and self.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
                    self._rehearse(document, len(listed))
            yield from listed

    def _check_examples(self) -> None:
        """Raise if there are not as many few-shot examples as are wanted, beside the question itself."""
        wanted = self.config.num_fewshot
        if not wanted:
            return
        found = len(self.sampler.df)
        own = self.fewshot_cfg.split is not None and self.fewshot_cfg.split == self.config.test_split
        if wanted > found - own:
            raise UserError(
                f"expected {wanted} few-shot examples for each question of task {self.config.task}; found "
                f"{found - own}: ask for fewer"
            )

    def _rehearse(self, document: Document, requests: int) -> None:
        """Mark made-up answers, so that a task that cannot mark its questions fails before the model answers them."""
        found = super().process_results(document, [(-1.0 - place, False) for place in range(requests)])
        for name in set(self.metrics) & set(found):
            mean([found[name]])
        unknown = sorted(set(self._metric_fn_list) - set(found))
        if unknown and self.config.process_results is None:
            raise UserError(
                f"expected metrics that lm-eval has for tasks of type {self.OUTPUT_TYPE}; found {unknown[0]!r} in "
                f"task {self.config.task}: mend its metric_list"
            )

    def doc_to_choice(self, doc: Document, doc_to_choice: Any = None) -> list[str]:
        """The choices as lm-eval reads them; `UserError` for anything but texts, which it would take apart."""
        texts: list[str] = super().doc_to_choice(doc, doc_to_choice)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(
                f"expected the choices of each question of task {self.config.task} as a list of texts; found {texts!r}"
                ": mend the data, or the task's doc_to_choice"
            )
        return texts

    def _key(self, document: Document, number: int) -> Key:
        """What lm-eval compares answers with. Raise where it would warn and count every answer as wrong."""
        texts = self.doc_to_choice(document)
        target = self.doc_to_text(document) if self.multiple_input else self.doc_to_target(document)
        right = target if isinstance(target, list) else [target]
        places = [texts.index(one) if isinstance(one, str) and one in texts else one for one in right]
        if not places or not all(isinstance(place, int) and 0 <= place < len(texts) for place in places):
            raise UserError(
                f"expected the right choice of each question of task {self.config.task} as a number from 0 to "
                f"{len(texts) - 1}, or as one of the choices; found {target!r} in question {number}: mend the data, or "
                "the task's doc_to_target"
            )
        self._check_meaning(document, number, texts, target)
        return Key(tuple(texts), tuple(places))

    def _check_meaning(self, document: Document, number: int, texts: list[str], target: Any) -> None:
        """Raise where a template makes a place of a text that is itself one of the choices: "1" of "1", "2", "3"."""
        column = str(self.config.doc_to_target).strip("{} ")
        text = document.get(column)
        if isinstance(text, str) and isinstance(target, int) and text in texts and texts.index(text) != target:
            raise UserError(
                f"expected the right choice of question {number} of task {self.config.task} as a number or as a text; "
                f"found {text!r}, which is place {target} and choice {texts.index(text)}: write 'doc_to_target: "
                f"{column}' without brackets if it is a text, or make the column a number"
            )


def allocate(sizes: Mapping[str, int], total: int, name: str) -> dict[str, int]:
    """Share `total` questions out among the subjects of a task in proportion to their sizes, at least one each.

    The largest remainders are rounded up (Hamilton's method): the sample's mean estimates that of all.

    Args:
        sizes: questions of each subject.
        name: of the task or group that has them, for the message.

    Raises:
        UserError: there are more subjects than questions to share out.
    """
    available = sum(sizes.values())
    if total >= available:
        return dict(sizes)
    if total < len(sizes):
        raise UserError(
            f"expected at least one question for each of the {len(sizes)} subjects of {name}; found a subsample of "
            f"{total}: take {len(sizes)} or more"
        )
    exact = {subject: total * size / available for subject, size in sizes.items()}
    given = {subject: max(1, math.floor(share)) for subject, share in exact.items()}
    while sum(given.values()) < total:
        given[max(given, key=lambda subject: exact[subject] - given[subject])] += 1
    while sum(given.values()) > total:  # where small subjects were given one for less
        several = [subject for subject in given if given[subject] > 1]
        given[max(several, key=lambda subject: given[subject] - exact[subject])] -= 1
    return given
