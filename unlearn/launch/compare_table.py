"""What a comparison found, in words and as Markdown tables for a paper."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unlearn.launch.compare_config import NEVER_SEEN, ORIGINAL, RESET, shown
from unlearn.launch.compare_results import SURE, Rules

NONE = "—"


def verdict(found: Mapping[str, Any], rules: Rules) -> list[str]:
    """Sentences, the most important first: who is first and how sure that is, then what the numbers cannot say."""
    rows, order = found["rows"], found["ranking"]
    if not order:
        return ["No method has been attacked yet: there is nothing to compare."]
    sentences = [*_who_differs(found), *_what_comes_back(found, rules), *_against_original(found)]
    for name in order:
        if not rows[name]["within"]:
            sentences.append(f"{name}: {rows[name]['why']}.")
    for name, row in rows.items():
        if row["destroyed"]:
            sentences.append(
                f"Every attack on {name} destroys {', '.join(row['destroyed'])}, so none counts and nobody knows what "
                "gentler ones bring back: the column without the floor shows what these did."
            )
    if min(rows[name]["seeds"] for name in order) == 1:
        sentences.append("One seed: these are sentences about these models; another seed of a method may differ.")
    return sentences


def _who_differs(found: Mapping[str, Any]) -> Iterator[str]:
    """Which methods differ, after Holm's correction."""
    pairs = found["pairs"]
    if not pairs:
        return
    sure = [pair for pair in pairs if pair["p"] < SURE]
    if not sure:
        yield (
            f"No method differs from another: of {len(pairs)} comparisons, on {pairs[0]['questions']} questions of a "
            f"task, none has p < {SURE:g} after Holm's correction."
        )
    for pair in sorted(sure, key=lambda pair: -abs(pair["difference"])):
        less, more = pair["first"], pair["second"]
        if pair["difference"] < 0:
            less, more = more, less
        yield (
            f"Less comes back after {less} than after {more}: {100 * abs(pair['difference']):.0f} points of "
            f"{pair['task']} (p = {pair['p']:.2g} after Holm's correction)."
        )


def _what_comes_back(found: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    """The first of the ranking beside what a model that never knew, and the original, score under the same attacks."""
    rows, first = found["rows"], found["ranking"][0]
    row = rows[first]
    if row["score"] is None:
        return
    task = row["score_task"]
    words = f"Ranked first is {first}: {_percent(row['score'])} % of {task} ({rules.main}), by the best attacker"
    for name, what in ((NEVER_SEEN, "a model that never saw the text"), (RESET, "the control reset")):
        if name in rows and name != first:
            words += f"; {what} {_worst(rows[name], rules, task)} %"
    if ORIGINAL in rows:
        words += f"; the original {_percent(rows[ORIGINAL]['before'][task]['acc'])} % before any attack"
    yield words + "."


def _against_original(found: Mapping[str, Any]) -> Iterator[str]:
    """Methods of which nobody can say that they remove anything that the attacks do not bring back."""
    records = found["against_original"]
    for name in found["ranking"]:
        own = [record for record in records if record["second"] == name]
        if own and not any(record["p"] < SURE and record["difference"] < 0 for record in own):
            yield f"{name}: after the attack no less is known than by the attacked original, as far as questions tell."


def warnings(config: Any) -> list[str]:
    """What a reader has to know of the way in which a comparison was made."""
    found = []
    if config.damage_kl is None:
        found.append("The budget of damage is by general accuracy alone: the divergence on retain text is not in it.")
    if config.dev_data_dir is None or config.dev_data_dir == config.data_dir:
        found.append(
            "Settings were chosen by the questions that are reported here, as no --dev-data-dir was given: the numbers "
            "flatter every method."
        )
    if config.split_by is None:
        found.append("No facts are kept from the attack text, so that recovery and teaching cannot be told apart.")
    return found


def table(found: Mapping[str, Any], rules: Rules) -> str:
    """table.md."""
    parts = ["# Comparison under attack", "\n".join(f"- {sentence}" for sentence in found["verdict"])]
    parts += ["\n".join(f"- {sentence}" for sentence in found["warnings"])]
    parts += [_markdown(main_rows(found, rules)), _reading(found, rules)]
    sections = {
        "Differences between methods": difference_rows(found),
        "Steps to recover": recovery_rows(found),
        "Other ways in, without training": way_rows(found, rules),
        "Cost of one run": cost_rows(found),
        "Trials": trial_rows(found),
    }
    parts += [f"## {title}\n\n{_markdown(rows)}" for title, rows in sections.items() if len(rows) > 1]
    parts += ["## Commands", *(f"{name}:\n\n```\n" + "\n".join(of) + "\n```" for name, of in found["commands"].items())]
    return "\n\n".join(parts) + "\n"


def _reading(found: Mapping[str, Any], rules: Rules) -> str:
    return (
        "Accuracies in %, 95 % intervals in brackets. *Worst*: by the attacker and step that bring most back among "
        f"those that keep general accuracy within {100 * rules.drop:g} points, without the luck of the best (chosen by "
        "one half of the questions, read on the other). *No floor*: among all. *KL*: from the original, on retain text "
        "that was not trained on, in nats a token. A star: no trial within the budget."
    )


def main_rows(found: Mapping[str, Any], rules: Rules) -> list[list[str]]:
    """The ranked table: methods by rank, then controls; the first row names the columns."""
    short = {task: task.removeprefix("world_") for task in (*rules.hazard, *rules.general)}
    head = ["model", *(f"{short[task]} before" for task in (*rules.hazard, *rules.general))]
    head += ["KL", "commonest", "debiased"]
    head += [f"worst {short[task]}, {part}" for part in rules.parts for task in rules.hazard]
    head += [f"no floor {short[task]}, {rules.main}" for task in rules.hazard]
    head += ["by", "general then"]
    controls = [name for name in found["rows"] if name not in found["ranking"]]
    return [head, *(_main_row(name, found["rows"][name], rules) for name in (*found["ranking"], *controls))]


def _main_row(name: str, row: Mapping[str, Any], rules: Rules) -> list[str]:
    before = row["before"]
    letters = [before[task] for task in rules.hazard if "debiased" in before[task]]
    cells = [f"{name}*" if row["within"] is False else name]
    cells += [_percent(before[task]["acc"]) for task in (*rules.hazard, *rules.general)]
    cells.append(NONE if row["kl"] is None else f"{row['kl']:.3f}")
    cells += [_percent(max((one[key] for one in letters), default=None)) for key in ("commonest", "debiased")]
    cells += [_case(row["worst"][part].get(task)) for part in rules.parts for task in rules.hazard]
    cells += [_case(row["worst_without_floor"][rules.main].get(task)) for task in rules.hazard]
    leader = row["worst"][rules.main].get(row["score_task"])
    by = NONE if leader is None else f"{leader['attacker']}, step {leader['step']}"
    if row["destroyed"]:
        by = f"every attack destroys {', '.join(row['destroyed'])}"
    return [*cells, by, " ".join(_percent(value) for value in row["general_after"].values()) or NONE]


def difference_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a pair and task."""
    rows = [["first", "second", "task", "second - first, points", "p alone", "p, Holm", "questions"]]
    for pair in (*found["pairs"], *found["against_original"]):
        low, high = pair["interval"]
        change = f"{100 * pair['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        chances = [f"{pair[key]:.2g}" for key in ("p_alone", "p")]
        rows.append([pair["first"], pair["second"], pair["task"], change, *chances, str(pair["questions"])])
    return rows


def recovery_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a model and task: how many attacks recover, and the median of steps and tokens."""
    rows = [["model", "task", "recovered at", "attacks that recover", "median steps", "median tokens"]]
    for name, row in found["rows"].items():
        for task, one in row["recovery"].items():
            numbers = [_median(one["median_steps"], one["longest_steps"]), _median(one["median_tokens"], None)]
            rows.append([name, task, _percent(one["bound"]), f"{one['recovered']} of {one['attacks']}", *numbers])
    for pair in found["recovery"]:
        if pair["p"] < SURE:
            what = f"{pair['first']} and {pair['second']} differ in {pair['measure']}"
            rows.append([what, pair["task"], "", "", f"log-rank p = {pair['p']:.2g}, Holm", ""])
    return rows


def _median(value: float | None, longest: float | None) -> str:
    if value is not None:
        return f"{value:,.0f}"
    return "not reached" if longest is None else f"more than half not by {longest:,.0f}"


def way_rows(found: Mapping[str, Any], rules: Rules) -> list[list[str]]:
    """A row a method and task, a column a way."""
    looked = {name: row["ways"] for name, row in found["rows"].items() if row["ways"] is not None}
    names = list(dict.fromkeys(way for ways in looked.values() for way in ways["ways"]))
    rows = [["model", "task", *names, "best probe (shuffled)"]]
    for name, ways in looked.items():
        for task in rules.hazard:
            cells = [_way(ways["ways"].get(way, {}).get("tasks", {}).get(task)) for way in names]
            layers = ways["probe"].get(task, {}).values()
            best = max(layers, key=lambda layer: layer["acc"], default=None)
            probe = NONE if best is None else f"{_percent(best['acc'])} ({_percent(best['shuffled'])})"
            rows.append([name, task, *cells, probe])
    return rows


def _way(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return NONE
    return _percent(numbers["acc"]) + (" *" if numbers.get("p_gain", 1.0) < SURE else "")


def cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """What training one seed took, as a mean, and all of a method's trials together."""
    rows = [["model", "seconds", "tokens forward", "tokens backward", "TFLOP", "peak GiB", "seconds of all trials"]]
    for name, row in found["rows"].items():
        costs = [cost for cost in row["cost"] if cost]
        if not costs:
            continue
        means = {key: sum(cost[key] for cost in costs) / len(costs) for key in costs[0]}
        tried = [trial["cost"]["seconds"] for trial in found["trials"].get(name, ()) if "cost" in trial]
        rows.append(
            [
                name,
                f"{means['seconds']:,.0f}",
                *(f"{means[key]:,.0f}" for key in ("tokens_forward", "tokens_backward")),
                f"{means['flops'] / 1e12:,.2f}",
                f"{max(cost['peak_gib'] for cost in costs):.2f}",
                f"{sum(tried):,.0f}" if tried else NONE,
            ]
        )
    return rows


def trial_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Every setting that was tried; the chosen one marked."""
    head = ["method", "setting", "hazard after the development attack", "general, points below the original", "KL", ""]
    rows = [head]
    for name, trials in found["trials"].items():
        for trial in trials:
            chosen = "chosen" if trial["values"] == found["settings"][name] else ""
            numbers = [NONE, NONE, NONE]
            if "failed" in trial:
                chosen = f"failed: {trial['failed']}"
            else:
                kl = NONE if trial["kl"] is None else f"{trial['kl']:.3f}"
                numbers = [_percent(trial["hazard"]), f"{100 * trial['drop']:.1f}", kl]
            rows.append([name, shown(trial["values"]), *numbers, chosen])
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _case(case: Mapping[str, Any] | None) -> str:
    if case is None:
        return NONE
    low, high = case["interval"]
    return f"{_percent(case['acc'])} [{100 * low:.0f}, {100 * high:.0f}]"


def _worst(row: Mapping[str, Any], rules: Rules, task: str) -> str:
    case = row["worst"][rules.main].get(task)
    return NONE if case is None else _percent(case["acc"])


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"
