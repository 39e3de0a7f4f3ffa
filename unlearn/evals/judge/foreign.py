"""Results that lm-eval itself wrote, of any model: read into what ours keep, from the samples beside them.

lm-eval's `--log_samples` writes samples_<task>_<time>.jsonl beside results_<time>.json, with every question's
log-likelihoods. From these come the pairing of answers, intervals and the letter check, as for results of our own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.evals.judge.answers import ACCURACIES, Answers, Key, Letters, Sample, collect, debias_small
from unlearn.evals.judge.summary import summarise


def own_part(result: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What `evals/run.py` would have kept under "unlearn" of a result: its own key, or, of lm-eval's own results, the
    same made of their samples: questions, summary.

    Args:
        result: what stands in `file`, a results_<time>.json.

    Raises:
        UserError: the file is neither, or there are no samples beside it.
    """
    own = result.get("unlearn")
    if isinstance(own, dict):
        return own
    if not isinstance(result.get("configs"), dict) or not isinstance(result.get("results"), dict):
        raise UserError(
            f"expected results of evals/run.py or lm-eval in {file}; found none of their keys: evaluate that model "
            "again with evals/run.py --out"
        )
    found = {name: _answers(name, config, file) for name, config in result["configs"].items()}
    answers = debias_small({name: one for name, one in found.items() if one is not None})
    if not answers:
        raise UserError(f"expected an accuracy of each question beside {file}; found none: choose other tasks")
    groups = result.get("group_subtasks", {})
    summary = summarise({"answers": answers, "group_subtasks": groups})
    return {"questions": {name: one.record() for name, one in answers.items()}, "summary": summary}


def _answers(name: str, config: Mapping[str, Any], file: Path) -> Answers | None:
    """The answers to one task; None if it has no accuracy."""
    listed = [str(one.get("metric")) for one in config.get("metric_list") or ()]
    metric = next((one for one in listed if one in ACCURACIES), None)
    if metric is None:
        return None
    samples = _samples(name, file)
    keys = [_key(sample, config) for sample in samples]
    known = [key for key in keys if key is not None]
    whole = known if len(known) == len(samples) else []
    return collect(samples, metric, letters=_letters(config), keys=whole)


def _samples(name: str, file: Path) -> list[Sample]:
    """The samples of one task, of its first filter, in the order of the questions."""
    stamp = file.stem.removeprefix("results_")
    place = file.with_name(f"samples_{name}_{stamp}.jsonl")
    if not place.is_file():
        raise UserError(
            f"expected {place.name} beside {file}, with each question's answer; found none: evaluate with lm-eval's "
            "--log_samples, or with evals/run.py --out"
        )
    try:
        lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
        first = [line for line in lines if line.get("filter") == lines[0].get("filter")] or [{}]
        return sorted((_sample(line) for line in first), key=lambda sample: int(sample["doc_id"]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"expected lm-eval's samples in {place}; found a line of another kind: {error!r}") from None


def _sample(line: dict[str, Any]) -> Sample:
    """A sample as lm-eval has it in memory: its files have numbers as texts."""
    arguments = line["arguments"]
    if isinstance(arguments, dict):  # {"gen_args_0": {"arg_0": context, "arg_1": continuation}, ...}
        arguments = [tuple(one.values()) for one in arguments.values()]
    responses = line["filtered_resps"]
    if all(isinstance(one, list | tuple) and len(one) == 2 for one in responses):
        responses = [(float(value), greedy in (True, "True")) for value, greedy in responses]
    needed = {key: line[key] for key in ("doc_hash", "prompt_hash", "target_hash")}
    return line | needed | {"arguments": arguments, "filtered_resps": responses}


def _key(sample: Sample, config: Mapping[str, Any]) -> Key | None:
    """What a question with choices is marked by; None for one without, or whose right choice is not given by place."""
    if config.get("output_type") != "multiple_choice":
        return None
    delimiter, target = str(config.get("target_delimiter", " ")), sample["target"]
    choices = [str(words[1]).removeprefix(delimiter) for words in sample["arguments"][: len(sample["filtered_resps"])]]
    place = choices.index(target) if target in choices else int(target) if str(target).isdigit() else -1
    return Key(tuple(choices), (place,)) if 0 <= place < len(choices) else None


def _letters(config: Mapping[str, Any]) -> Letters | None:
    """The names of the choices, where they are letters, alike for every question."""
    names = config.get("doc_to_choice")
    named = isinstance(names, list) and len(names) > 1 and all(isinstance(one, str) and len(one) == 1 for one in names)
    return Letters(tuple(names)) if named and isinstance(names, list) else None
