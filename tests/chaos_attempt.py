"""One attempt at a run of train.py in several processes, to disturb: forked from this one, or under launch/node.sh."""

import faulthandler
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
PATIENCE = 120.0  # seconds for one attempt
STACKS = signal.SIGUSR2  # on which a forked rank logs where its threads are


class Forked:
    """The ranks of one attempt as forked processes; like torchrun, ends all of them when one fails."""

    def __init__(self, words: list[str], ranks: int, log: Path, file_limit: int | None = None):
        port = free_port()
        self._codes: dict[int, int] = {}
        self.ranks = [self._fork(words, rank, ranks, port, log, file_limit) for rank in range(ranks)]
        self._failed = 0.0

    def _fork(self, words: list[str], rank: int, ranks: int, port: int, log: Path, file_limit: int | None) -> int:
        pid = os.fork()
        if pid > 0:
            return pid
        import torch

        torch.set_num_threads(1)  # first of all: OpenMP's threads did not survive the fork
        os.environ.update(ENVIRONMENT)
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(STACKS)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        code = 1
        try:
            import train
            from unlearn.errors import run_command

            sys.argv = words
            run_command("train.py", train.main)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """kill -9 of all ranks, which first say where they are."""
        self.signal_all(STACKS)
        time.sleep(0.5)
        self.signal_all(signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        for pid in self.ranks:
            self.signal(pid, number)

    def signal(self, pid: int, number: int) -> None:
        if pid not in self._codes:
            os.kill(pid, number)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for pid in self.ranks:
            if pid not in self._codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        if not self._failed and any(self._codes.values()):
            self._failed = time.monotonic()
            self.signal_all(signal.SIGTERM)
        if self._failed and time.monotonic() > self._failed + 8.0:
            self.signal_all(signal.SIGKILL)
        return len(self._codes) == len(self.ranks)

    @property
    def succeeded(self) -> bool:
        return not any(self._codes.values())


class Launched:
    """The ranks of one attempt under launch/node.sh: torchrun where there are several, an agent for each of `nodes`."""

    def __init__(self, words: list[str], ranks: int, log: Path, nodes: int = 1):
        environment = os.environ | ENVIRONMENT | {"PYTHON": sys.executable, "SHUTDOWN_SECONDS": "8"}
        endpoint = f"127.0.0.1:{free_port()}"
        self._alone, self.agents = ranks == 1, []
        for node in range(nodes):
            place = f"--nodes {nodes} --endpoint {endpoint} --id {endpoint} --host {int(node == 0)} --address 127.0.0.1"
            options = f"--ranks {ranks // nodes} {place if nodes > 1 else ''}".split()
            with log.open("a") as output:
                script = [str(ROOT / "launch/node.sh"), *options, *words]
                process = subprocess.Popen(script, cwd=ROOT, env=environment, stdout=output, stderr=output)
            self.agents.append(process)

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        if self._alone:
            return [self.agents[0].pid]
        return [pid for agent in self.agents for pid in children(agent.pid)]

    def kill(self) -> None:
        for number in range(len(self.agents)):
            self.kill_node(number)

    def kill_node(self, number: int) -> None:
        """kill -9 of an agent, before it could tell anybody, and then of its ranks."""
        ranks = children(self.agents[number].pid)
        self.agents[number].kill()
        for pid in ranks:
            self.signal(pid, signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        for agent in self.agents:
            agent.send_signal(number)

    def signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def poll(self) -> bool:
        """Whether all have ended."""
        return all([agent.poll() is not None for agent in self.agents])

    @property
    def succeeded(self) -> bool:
        return not any(agent.returncode for agent in self.agents)


def children(pid: int) -> list[int]:
    """The processes that a process has started and not yet waited for."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait(job: Forked | Launched, seconds: float = PATIENCE) -> bool:
    """Wait for all ranks; kill them if they take too long, and say so."""
    deadline = time.monotonic() + seconds
    while not job.poll():
        if time.monotonic() > deadline:
            job.kill()
            while not job.poll():
                time.sleep(0.05)
            return False
        time.sleep(0.01)
    return True
