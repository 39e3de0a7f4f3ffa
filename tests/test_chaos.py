"""A short form of `make chaos`: two kinds of run, the disturbances that bite most; and two nodes."""

import pytest
from chaos import Case, Chaos

CASES = [
    Case(0, "full-adamw", 2, "kill", "saving", 0.5, 1),
    Case(1, "full-adamw", 2, "usr1", "any", 0.7, 0),
    Case(2, "lora-muon", 1, "kill", "exporting", 0.5, 0),
    Case(3, "lora-muon", 1, "disk", "saving", 0.3, 0),
]

TWO_NODES = [
    Case(4, "lora-adamw", 2, "none", "exporting", 0.5, 0, "agents"),
    Case(5, "lora-adamw", 2, "node", "evaluating", 0.5, 0, "agents"),
    Case(6, "lora-adamw", 2, "node", "saving", 0.7, 1, "agents"),
    Case(7, "lora-adamw", 2, "kill", "any", 0.7, 1, "agents"),
    Case(8, "lora-adamw", 2, "usr1", "any", 0.7, 0, "agents"),
]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.ranks}-{case.fault}")
def test_a_disturbed_run_ends_in_the_same_bits(chaos: Chaos, case: Case) -> None:
    _, wrong = chaos.run(case)
    assert wrong == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_NODES, ids=lambda case: f"{case.fault}-{case.rank}")
def test_a_run_on_two_nodes_ends_in_the_bits_of_two_ranks_on_one(chaos: Chaos, case: Case) -> None:
    """Two torchrun agents on this machine: undisturbed; the host of their store, the other one, a rank killed; USR1."""
    _, wrong = chaos.run(case)
    assert wrong == ""
