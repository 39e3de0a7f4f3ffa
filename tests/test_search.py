"""The search: each state moves it the right way, and on simulated trade-offs it needs fewer trials than the grid."""

import math
import random
import statistics
from collections.abc import Callable

import pytest

from unlearn.evals.judge.targets import parse_target
from unlearn.evals.judge.verdict import judge
from unlearn.launch.search import Outcome, Space, State, Values, classify, confirmed, next_point

FLAGS = {
    "remove-coef": ("2", "3", "5", "8", "12", "20", "32", "50"),
    "retain-coef": ("1", "3", "10", "30"),
    "adam-lr": ("3e-4", "1e-3", "3e-3"),
}
BOUNDARY, GRID = Space(FLAGS, "remove-coef"), Space(FLAGS)
STATES: dict[tuple[bool, bool], State] = {
    (False, True): "push harder",
    (True, False): "push less",
    (False, False): "gentler",
    (True, True): "met",
}
Tradeoff = Callable[[Values], tuple[float, float, bool]]


def verdict(hazard: float, general: float, check: str = "chance") -> State:
    def numbers(acc: float) -> dict[str, object]:
        found = {"acc": acc, "interval": [acc, acc], "questions": 1000, "letters": list("ABCD")}
        found |= {"predicted": [0.25] * 4, "debiased": acc, "debiased_interval": [acc, acc], "letter_check": check}
        return found | {"p_more": 0.5, "p_fewer": 0.5, "independent": 0.25}

    summary = {"wmdp_bio": numbers(hazard), "mmlu_stem": numbers(general)}
    return classify(judge(summary, map(parse_target, ("wmdp_bio<=0.27", "mmlu_stem>=0.34"))))


def test_four_states_and_collapse() -> None:
    assert verdict(0.43, 0.37) == "push harder"
    assert verdict(0.25, 0.25) == "push less"
    assert verdict(0.33, 0.30) == "gentler"
    assert verdict(0.25, 0.36) == "met"
    assert verdict(0.25, 0.36, "collapse") == "gentler"
    assert verdict(0.25, 0.25, "collapse") == "push less"


def first_move(state: State) -> tuple[dict[str, str], dict[str, str], int]:
    found = next_point(BOUNDARY, [])
    assert found is not None
    after = next_point(BOUNDARY, [Outcome(*found, state)])
    assert after is not None
    return dict(found[0]), dict(after[0]), after[1]


def test_each_state_moves_the_search() -> None:
    start, after, _ = first_move("push harder")
    assert float(after["remove-coef"]) > float(start["remove-coef"]) and after["adam-lr"] == start["adam-lr"]
    start, after, _ = first_move("push less")
    assert float(after["remove-coef"]) < float(start["remove-coef"]) and after["retain-coef"] == start["retain-coef"]
    for state in ("gentler", "failed"):
        start, after, _ = first_move(state)  # type: ignore[arg-type]
        retain, rate = float(after["retain-coef"]), float(after["adam-lr"])
        assert retain > float(start["retain-coef"]) or rate < float(start["adam-lr"])
    start, after, seed = first_move("met")
    assert after == start and seed == 1


def test_bisection_is_in_log_space_and_ends() -> None:
    space = Space({"remove-coef": ("1", "100")}, "remove-coef")
    trials: list[Outcome] = []
    while (found := next_point(space, trials)) is not None:
        push = float(dict(found[0])["remove-coef"])
        trials.append(Outcome(*found, "push harder" if push < 7.3 else "push less"))
    pushes = [float(dict(trial.values)["remove-coef"]) for trial in trials]
    assert pushes[:3] == [10.0, 3.16, 5.62]
    weak, strong = max(p for p in pushes if p < 7.3), min(p for p in pushes if p >= 7.3)
    assert strong / weak < 1.2 and len(pushes) <= 6


def tradeoff(seed: int) -> Tradeoff:
    """A made-up model: where the hazard falls along log push, how far behind the rest falls, how steeply, and how both
    move with retaining and the learning rate. Values -> (hazard accuracy, general accuracy, diverged)."""
    rng = random.Random(seed)
    fall, rate, retain = rng.uniform(math.log(2.5), math.log(40)), rng.uniform(0.5, 1.5), rng.uniform(0.2, 0.8)
    gap, gap_retain, gap_rate = rng.uniform(-0.5, 0.8), rng.uniform(0.2, 0.6), rng.uniform(0.1, 0.5)
    width, width_general = rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.4)

    def share(x: float) -> float:
        return 1 / (1 + math.exp(max(-50.0, min(50.0, x))))

    def measure(values: Values) -> tuple[float, float, bool]:
        v = {flag: float(value) for flag, value in values}
        lr, kept = math.log(v["adam-lr"] / 1e-3), math.log(v["retain-coef"] / 3)
        push = math.log(v["remove-coef"]) + rate * lr - retain * kept - fall
        general = 0.25 + 0.12 * share((push - gap - gap_retain * kept + gap_rate * lr) / width_general)
        return 0.25 + 0.2 * share(push / width), general, push > 3.5

    return measure


def state_of(measure: Tradeoff, values: Values, seed: int, noise: float = 0.0) -> State:
    hazard, general, diverged = measure(values)
    if noise > 0.0:
        rng = random.Random(repr((values, seed)))
        hazard, general = hazard + rng.gauss(0, noise), general + rng.gauss(0, noise)
    low, kept = hazard <= 0.27, general >= 0.34  # as test_four_states pins for the true verdict
    return "failed" if diverged else STATES[low, kept]


def search(space: Space, measure: Tradeoff, noise: float = 0.0) -> tuple[int, Values | None]:
    """Trials until one point has met the target with all seeds, and the point; None if it gave up."""
    trials: list[Outcome] = []
    while (winner := confirmed(space, trials)) is None and (found := next_point(space, trials)) is not None:
        assert (found[0], found[1]) not in [(trial.values, trial.seed) for trial in trials], "repeated"
        trials.append(Outcome(*found, state_of(measure, *found, noise)))
    return len(trials), winner


@pytest.mark.parametrize(("noise", "most", "share"), [(0.0, 30, 0.99), (0.004, 35, 0.85)])
def test_beats_the_grid_on_hundreds_of_tradeoffs(noise: float, most: int, share: float) -> None:
    """Every trade-off of 600 that some point of the grid of 96 solves, and what plain random search over that grid is
    expected to need (97 / (solutions + 1), and the two further seeds), which is fairer to it than its own order.

    Found: in 99 % of them without noise, 85 % with a standard deviation of 0.4 points (three seeds have to meet a
    target that some of these can only just reach); in at most `most` trials, in under half of the grid's on average.
    """
    ours, theirs = [], []
    solvable = 0
    for seed in range(600):
        measure = tradeoff(seed)
        solutions = sum(state_of(measure, values, 0) == "met" for values in GRID.points())
        if solutions == 0:
            continue
        solvable += 1
        trials, winner = search(BOUNDARY, measure, noise)
        if winner is None:
            continue
        hazard, general, _ = measure(winner)
        assert hazard <= 0.27 + 4 * noise and general >= 0.34 - 4 * noise
        ours.append(trials)
        theirs.append(97 / (solutions + 1) + 2)
    assert solvable >= 200 and len(ours) >= share * solvable
    assert max(ours) <= most and statistics.median(ours) <= 15
    assert statistics.mean(ours) < 0.5 * statistics.mean(theirs)


def test_the_search_tries_everything_before_it_gives_up() -> None:
    """Rules of thumb that do not hold for a model cost trials, not the answer: one setting alone meets the target."""
    for setting in BOUNDARY.settings():
        trials: list[Outcome] = []
        while (found := next_point(BOUNDARY, trials)) is not None:
            met = BOUNDARY.split(found[0])[0] == setting
            trials.append(Outcome(*found, "met" if met else "gentler"))
            if confirmed(BOUNDARY, trials):
                break
        assert confirmed(BOUNDARY, trials) is not None, setting
