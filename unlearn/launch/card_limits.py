"""What a card must say was not tested: whatever a run's files show no trace of."""

from collections.abc import Iterator

from unlearn.launch.report.attacks import UNLEARNED
from unlearn.launch.report.record import Tasks
from unlearn.launch.share import Share

HAZARD = ("wmdp",)  # what the names of tasks begin with whose knowledge should be gone


def limits(share: Share) -> Iterator[str]:
    """Sentences, each about one thing that nobody has looked at."""
    after, before = share.tasks(share.record.after), share.tasks(share.record.before)
    yield from _of_questions(share, before, after)
    yield from _of_attacks(share)
    yield (
        "No way in that trains nothing is part of this card: rounded or pruned weights, other prompts, a linear probe "
        "(`unlearn elicit`)."
    )
    yield f"One run, of seed {share.record.config.get('seed', 0)}: another seed may end elsewhere."
    yield "No control is beside it: what the same training does without a forget loss is not known."
    if "damage" not in share.record.recorded:
        yield "How far predictions on other text moved from the original's was not measured (`--measure-damage`)."
    yield "What it writes was not read: neither its fluency nor whether it tells the forgotten in its own words."
    if not share.license:
        yield "The base model's license is not stated here: no README.md or config.json of it at hand names one."
    if share.base is None:
        yield "The base model's name on the hub is not known here (`unlearn push --base`)."


def hazard_of(share: Share, tasks: Tasks) -> list[str]:
    """The tasks whose knowledge should be gone: by their names, by what attacks call so, and by targets from above."""
    named = {task for attack in share.record.attacks for task in attack.grid.get("hazard", ())}
    for measurement in share.record.after:
        judged = measurement.verdict.get("targets", ()) if isinstance(measurement.verdict, dict) else ()
        named |= {str(one["target"]).partition("<=")[0] for one in judged if "<=" in str(one.get("target"))}
    return [task for task in tasks if task.startswith(HAZARD) or task in named or "hazard" in task]


def _of_questions(share: Share, before: Tasks, after: Tasks) -> Iterator[str]:
    if not after:
        yield "The model itself was not evaluated: no accuracy here is of these weights."
        return
    if not before:
        yield "The model before unlearning was not evaluated: how much was removed cannot be said."
    hazard = hazard_of(share, after)
    general = [task for task in after if task not in hazard]
    asked = {name: one for attack in share.record.attacks for name, one in attack.points[0][1].items()} | after
    if not hazard:
        yield "No task of the forgotten domain was measured."
    elif all("predicted" in asked[task] for task in hazard_of(share, asked)):
        yield (
            "The forgotten domain was asked by letters alone: no cloze, no open questions, no statements. Knowledge "
            "that letters no longer show often survives in another form."
        )
    if not general:
        yield "No task of general knowledge was measured: what else was lost is not known."
    if not any("orders" in after[task] for task in hazard):
        yield "Every question was asked in one order of its choices (`--permute-choices` asks in all)."
    if not any(measurement.verdict for measurement in share.record.after):
        yield "No target was set."
    yield from _cut_short(share)
    odd = [task for task in after if task in before and before[task].get("questions") != after[task].get("questions")]
    if odd:
        yield f"Before and after are of different numbers of questions: {', '.join(odd)}."


def _cut_short(share: Share) -> Iterator[str]:
    """Which questions were left out."""
    cut = {task: counts for task, counts in share.cut_short().items() if task not in share.record.members}
    if cut:
        yield (
            "Not every question was asked: "
            + "; ".join(f"{a:,} of {b:,} of {one}" for one, (a, b) in cut.items())
            + "."
        )
    flags = {name: share.record.config.get(name) for name in ("limit", "eval_subsample")}
    results = [one for one in share.record.after if not one.file.name.startswith("step-")]
    own = share.tasks(share.record.after).keys() - share.tasks(results).keys()
    for name, value in flags.items():
        if own and value is not None:
            yield f"Of {', '.join(sorted(own))} at most {value:,} questions of a task were asked (`{name}`)."


def _of_attacks(share: Share) -> Iterator[str]:
    attacks = share.record.attacks
    if not attacks:
        yield (
            "No attack was made. A few fine-tuning steps often bring back what unlearning has only hidden "
            "(`unlearn attack`)."
        )
        return
    subjects = [attack.grid.get("subjects", {}) for attack in attacks]
    if sum(max(1, len(one.get(UNLEARNED, {}).get("attacks", ()))) for one in subjects) == 1:
        yield "One attack at one setting: a stronger or gentler one may bring back more."
    if not any("never-seen" in one for one in subjects):
        yield "No model that never saw the forgotten text was attacked beside it: what an attack teaches is not known."
    if not any("original" in one for one in subjects) and not any(attack.grid.get("gap") for attack in attacks):
        yield "The original was not attacked beside it: what there was to recover is not known."
    if not any(attack.grid.get("general") for attack in attacks):
        yield "No general task was measured under attack: an attack that destroys the model counts like any other."
