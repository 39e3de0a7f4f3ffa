"""A short form of `make chaos`: two kinds of run, the disturbances that bite most."""

import pytest
from chaos import Case, Chaos

CASES = [
    Case(0, "full-adamw", 2, "kill", "saving", 0.5, 1, False),
    Case(1, "full-adamw", 2, "usr1", "any", 0.7, 0, False),
    Case(2, "lora-muon", 1, "kill", "exporting", 0.5, 0, False),
    Case(3, "lora-muon", 1, "disk", "saving", 0.3, 0, False),
]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.ranks}-{case.fault}")
def test_a_disturbed_run_ends_in_the_same_bits(chaos: Chaos, case: Case) -> None:
    _, wrong = chaos.run(case)
    assert wrong == ""
