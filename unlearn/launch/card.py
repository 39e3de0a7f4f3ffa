"""The model card of a run, written from its files: what was done, what came of it, and what nobody has looked at."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from unlearn.evals.judge.verdict import SEVERITY
from unlearn.launch import places
from unlearn.launch.card_header import header
from unlearn.launch.card_limits import HAZARD, limits
from unlearn.launch.report import origins
from unlearn.launch.report.attacks import UNLEARNED, recoveries
from unlearn.launch.report.record import Attack
from unlearn.launch.share import Share
from unlearn.methods import METHODS, docstring_of
from unlearn.run.folder import FREE

ARXIV = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}")
FIRST = {  # how a card begins, by the worst word of the verdict
    "met": "Its targets are met, in the form in which the questions were asked.",
    "too few questions to say": "**Whether its targets are met is open: there were too few questions to say.**",
    "met only by collapse": "**Its targets are met only by collapse: it answers by habit, and may know what it did.**",
    "not met": "**Its targets are not met.**",
}
CHECKS = {
    "collapse": "one letter is given so often that the accuracy says nothing about knowledge",
    "avoidance": "fewer right answers than by chance, so the right letters are known, and avoided",
    "informed": "more right answers than by chance, so something is left",
    "chance": "the answers have nothing to do with the questions",
}
ELSEWHERE = FREE | {"model", "forget", "retain", "lens", "prompts", "export", "log_every", "method", "eval_tasks"}
ELSEWHERE |= {"eval_every", "limit", "eval_subsample", "split_by"}  # all of these are no settings, or stand elsewhere
OFF = ("False", "none", "0")


def card(share: Share) -> str:
    """README.md of the folder, with its header."""
    parts = {
        "": _first(share),
        "What was removed, and how": _how(share),
        "Before and after": _numbers(share),
        "Under attack": _attacks(share),
        "What was not tested": (f"- {one}" for one in limits(share)),
        "How to load it": _loading(share),
        "How it was made": _origin(share),
    }
    text = [f"# {share.title}"]
    for heading, lines in parts.items():
        found = list(lines)
        text += [f"## {heading}", *found] if heading and found else found
    body = places.words(_joined(text), share.record.folder)
    return f"---\n{header(share)}---\n\n{body}\n"


def _joined(blocks: Sequence[str]) -> str:
    """Blocks with an empty line between them, but for the lines of a list or a table."""
    text = blocks[0]
    for before, after in zip(blocks, blocks[1:], strict=False):
        together = after[:2] == before[:2] and after[:2] in ("- ", "| ")
        text += ("\n" if together else "\n\n") + after
    return text


def _first(share: Share) -> Iterator[str]:
    """The first paragraph: what this is, whether it did what it should, and what brings the knowledge back."""
    what = "This model is" if share.config.what == "model" else "This LoRA adapter makes a model that is"
    rank = share.record.config.get("lora_rank")
    kind = f"LoRA of rank {rank}" if rank else "full training"
    sentences = [f"{what} {_base(share)} after unlearning by the method `{share.method}` ({kind}).", _verdict(share)]
    yield " ".join([*sentences, *_returns(share)])


def _base(share: Share) -> str:
    if share.base is not None:
        return f"[{share.base}](https://huggingface.co/{share.base})"
    return f"`{places.path(str(share.record.config['model']), share.record.folder)}` (a local folder)"


def _verdict(share: Share) -> str:
    """What the evaluations say of their targets; the worst word counts."""
    found = [one.verdict for one in share.record.after if one.verdict]
    judged = [one for one in found if isinstance(one, dict)]
    given = [str(one[key]) for one in judged for key in ("by_point", "by_interval") if one.get(key)]
    if not given:
        return "No target was set, so nothing says whether enough was removed."
    worst = max(given, key=lambda word: SEVERITY.index(word) if word in SEVERITY else len(SEVERITY))
    return FIRST.get(worst, f"**Its verdict is: {worst}.**")


def _returns(share: Share) -> list[str]:
    """A sentence for each hazard task: the most that any attack brought back."""
    if not share.record.attacks:
        return ["Nobody has attacked it: whether the knowledge is gone or only hidden is not known."]
    found: dict[str, Mapping[str, Any]] = {}
    for attack in share.record.attacks:
        for task, best in _peaks(attack):
            if task not in found or best["acc"] > found[task]["acc"]:
                found[task] = best
    if not found:
        return ["It was attacked, and no attack counts: see below."]
    return [
        f"After {best['step']:,} steps of fine-tuning by an attacker it scores {_accuracy(best)} on {task}."
        if best["step"]
        else f"No attack raised it above the {_accuracy(best)} that it scores on {task}."
        for task, best in found.items()
    ]


def _peaks(attack: Attack) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(task, highest point) of an attack on the unlearned model: of its envelope, or of its course without one."""
    for group in _groups(attack):
        best = next((row["best"] for row in group["rows"] if row["name"] == UNLEARNED), None)
        if best is not None:
            yield group["task"], best
    if not attack.grid:
        for task in attack.points[0][1]:
            points = [tasks[task] | {"step": step} for step, tasks in attack.points if task in tasks]
            if "/" not in task and task not in attack.members and task.startswith(HAZARD):
                yield task, max(points, key=lambda point: point["acc"])


def _how(share: Share) -> Iterator[str]:
    config, run = share.record.config, share.record.folder
    if share.method in METHODS:
        text = docstring_of(share.method)
        yield " ".join(text.partition("\n\n")[0].split())
        papers = dict.fromkeys(ARXIV.findall(text))
        if papers:
            yield "Method: " + ", ".join(f"<{paper}>" for paper in papers) + "."
    read = [name for name in ("forget", "retain") if f"{name} corpus" in _identity(share)]
    if read:
        yield "Text: " + ", ".join(f"to {name} `{places.path(str(config[name]), run)}`" for name in read) + "."
    idle = {"stop_every", "stop_windows"} if not config.get("stop_at") else set()
    settings = {name: value for name, value in origins.given(config).items() if name not in ELSEWHERE | idle}
    shown = {name: value for name, value in settings.items() if value not in OFF or name == "seed"}
    yield from _table(("setting", "value"), [(f"`{one}`", f"`{places.path(shown[one], run)}`") for one in shown])


def _numbers(share: Share) -> Iterator[str]:
    before, after = share.tasks(share.record.before), share.tasks(share.record.after)
    stages = {"before": before, "after": after}
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        yield "Nothing was measured."
        return
    yield "Accuracy in per cent, with 95 % intervals."
    rows = [(name, *(_cell(tasks.get(name, {})) for tasks in stages.values())) for name in names]
    yield from _table(("task", "before", "after"), rows)
    yield from _letters({stage: tasks for stage, tasks in stages.items() if tasks})
    for measurement in share.record.after:
        if isinstance(measurement.verdict, dict):
            yield f"```\n{measurement.verdict.get('words', '')}\n```"
        elif measurement.verdict:
            yield str(measurement.verdict)


def _letters(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """The letter check: what was answered, and whether that has anything to do with the questions."""
    found = {
        (task, stage): numbers
        for stage, tasks in stages.items()
        for task, numbers in tasks.items()
        if numbers.get("predicted")
    }
    if not found:
        return
    yield "The letter check: does the accuracy come from knowledge, or from a habit of one letter?"
    rows = [
        (task, stage, _commonest(one), _cell(one, "debiased"), str(one.get("letter_check", "not made")))
        for (task, stage), one in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] == "after"))
    ]
    yield from _table(("task", "", "commonest letter", "without each letter's mean", "check"), rows)
    words = dict.fromkeys(str(one.get("letter_check")) for one in found.values())
    yield from (f"- *{word}*: {CHECKS[word]}." for word in words if word in CHECKS)


def _commonest(numbers: Mapping[str, Any]) -> str:
    share = max(numbers["predicted"])
    letters = numbers.get("letters") or ["?"] * len(numbers["predicted"])
    return f"{letters[numbers['predicted'].index(share)]}, {100 * share:.1f} % of the answers"


def _attacks(share: Share) -> Iterator[str]:
    for attack in share.record.attacks:
        table, groups = recoveries(attack), _groups(attack)
        yield f"`{attack.folder.resolve().name}`: {_attackers(attack)}"
        for group in groups:
            yield f"{group['task']}, the best attacker at each step that keeps general accuracy:"
            fractions = table["fractions"] if table is not None else []
            heading = ("model", "attacks", "before", "highest", *(f"to recover {one}" for one in fractions))
            yield from _table(heading, map(_attacked, group["rows"]))
        if not groups:
            rows = [
                (task, _cell(attack.points[0][1][task]), _cell(attack.points[-1][1].get(task, {})))
                for task in attack.points[0][1]
                if "/" not in task and task not in attack.members
            ]
            yield from _table(("task", "before the attack", f"after {attack.points[-1][0]} steps"), rows)
        yield from (f"- Warning: {warning}." for warning in attack.warnings)


def _groups(attack: Attack) -> list[dict[str, Any]]:
    """The rows of an attack's table, by hazard task."""
    table = recoveries(attack)
    return [] if table is None else table["groups"]


def _attackers(attack: Attack) -> str:
    """What was tried."""
    tried = attack.grid.get("subjects", {}).get(UNLEARNED, {}).get("attacks", {})
    count = max(1, len(tried))
    steps = max([one.get("steps", 0) for one in tried.values()] + [attack.points[-1][0]])
    text = places.path(str(attack.config.get("forget", "")), attack.folder) or "text that was not written down"
    return f"{count} attack{'s' if count > 1 else ''} by fine-tuning, of up to {steps:,} steps on `{text}`."


def _attacked(row: Mapping[str, Any]) -> tuple[str, ...]:
    best = row["best"]
    highest = "none counts" if best is None else f"{_cell(best)}, step {best['step']}"
    return (row["name"], str(row["attacks"]), _cell(row["before"]), highest, *row["costs"])


def _loading(share: Share) -> Iterator[str]:
    where, base = share.config.repo or "OWNER/NAME", share.base or "THE BASE MODEL"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if share.config.what == "adapter":
        lines[1:1] = ["from peft import PeftModel"]
        lines += [f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{where}")']
    else:
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{where}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{base if share.config.what == "adapter" else where}")']
    yield "\n".join(["```python", *lines, "```"])
    if share.config.lens:
        yield "`lens/` is the tuned lens that the run used, in the files of the `tuned-lens` package."


def _origin(share: Share) -> Iterator[str]:
    run, attempts = share.record.folder, share.record.recorded.get("attempts") or [{}]
    yield "`RUN` stands for the run's folder; of other folders only the last name is given."
    lines = [f"# {label}\n{places.command(text, run)}" for label, text in origins.commands(share.record)]
    yield "\n".join(["```", *lines, "```"])
    digests = [(name, f"`{value}`") for name, value in _identity(share).items()]
    yield from _table(("what", "sha256"), [*digests, ("the weights here", f"`{share.weights}`")])
    versions = dict(attempts[-1].get("versions", {})) | {"unlearn": origins.versions().get("unlearn", "not installed")}
    facts = [f"{name} {value}" for name, value in versions.items()]
    facts += [f"code {str(attempts[-1]['code'])[:12]}"] if attempts[-1].get("code") else []
    facts += [f"{attempts[-1].get('ranks', 1)} rank(s), {attempts[-1].get('device', 'an unknown device')}"]
    yield "Made with " + ", ".join(facts) + "."
    if len(attempts) > 1:
        yield f"The run was started {len(attempts)} times; these are the last start's."
    if share.results:
        yield "Files of results, in lm-eval's layout without samples: " + ", ".join(f"`{one}`" for one in share.results)


def _identity(share: Share) -> Mapping[str, str]:
    found = share.record.recorded.get("identity", {})
    return {places.words(str(name), share.record.folder): str(value) for name, value in found.items()}


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; none without rows."""
    found = list(rows)
    for row in [heading, ["---"] * len(heading), *found] if found else []:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _cell(numbers: Mapping[str, Any], key: str = "acc") -> str:
    """An accuracy with its interval, "–" where there is none."""
    if key not in numbers:
        return "–"
    ends = numbers.get("interval" if key == "acc" else f"{key}_interval")
    shown = f"{100 * numbers[key]:.1f}"
    return shown if ends is None else f"{shown} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _accuracy(numbers: Mapping[str, Any]) -> str:
    value, _, ends = _cell(numbers).partition(" ")
    return f"{value} % {ends}".strip()
