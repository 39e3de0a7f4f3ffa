"""What torchrun tells a rank, where something is missing or wrong in it."""

import os
import socket
from collections.abc import Callable

import pytest
import torch.distributed as dist

from unlearn.distributed import fail_together, process_group
from unlearn.errors import OnEveryRank, UserError, run_command

GOOD = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"MASTER_ADDR": None}, "found MASTER_ADDR=''"),
        ({"MASTER_PORT": None}, "found MASTER_PORT=''"),
        ({"RANK": "x"}, "found RANK='x'"),
        ({"WORLD_SIZE": "-1"}, "found WORLD_SIZE='-1'"),
        ({"RANK": "2"}, "found MASTER_PORT=29500 RANK=2 WORLD_SIZE=1"),
        ({"MASTER_PORT": "70000"}, "found MASTER_PORT=70000 RANK=0"),
    ],
    ids=str,
)
def test_a_wrong_place_is_named(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], found: str) -> None:
    """A rank without an address, or one that is no number, ended in a traceback."""
    for name, value in (GOOD | changes).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as caught, process_group():
        pass
    assert found in str(caught.value) and "start with torchrun" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_a_sentence(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in (GOOD | {"MASTER_ADDR": address, "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"{address}:{port}; found .*choose another MASTER_PORT"), process_group():
            pass


def test_the_sentence_is_said_whatever_the_rank_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setattr("unlearn.errors.time.sleep", lambda _: None)
    monkeypatch.setattr("unlearn.errors.atexit.register", lambda _: None)

    def command() -> None:
        with process_group():
            pass

    with pytest.raises(SystemExit):
        run_command("command", command)
    assert capsys.readouterr().err.startswith("command: error: expected MASTER_ADDR")


def _alone() -> None:
    raise UserError("mine")


def _together() -> None:
    with fail_together():
        raise UserError("ours")


@pytest.mark.parametrize(("fail", "left"), [(_alone, False), (_together, True)])
def test_a_group_is_left_only_where_all_ranks_leave_it(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], left: bool
) -> None:
    """The mistake of one rank alone took down NCCL's group, which may wait for ever for the others' collectives."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for name, value in (GOOD | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError) as caught, process_group():
            monkeypatch.setattr("unlearn.distributed.world_size", lambda: 2)
            monkeypatch.setattr("unlearn.distributed.gather", lambda value: [None, value])
            fail()
        assert isinstance(caught.value, OnEveryRank) == left
        assert dist.is_initialized() != left
    finally:
        monkeypatch.undo()
        if dist.is_initialized():
            dist.destroy_process_group()
    assert "RANK" not in os.environ
