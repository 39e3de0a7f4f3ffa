"""The device that a run computes on: a GPU of each rank's own, or the CPU, but never the CPU by mistake."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from unlearn.errors import UserError

DEV, PROC = Path("/dev"), Path("/proc")
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that ask for no GPU
WHEELS = "https://download.pytorch.org/whl"
# The oldest driver of each CUDA, and an index with wheels for it, aarch64 among them
# (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
INDEXES = ((580, "cu130"), (525, "cu126"))
# Of dense bf16 products, from NVIDIA's data sheets, which halve what they print for sparse ones; the first that fits.
DENSE_TFLOPS = (("H100 PCIe", 756.0), ("H100|H200|GH200", 989.0), ("A100", 312.0), ("B200", 2250.0))


def choose_device(asked: str | None) -> torch.device:
    """This rank's device.

    Args:
        asked: `cpu`, `cuda`, or None: a GPU where this machine has one, else the CPU.

    Raises:
        UserError: there are GPUs that torch cannot use, or fewer than ranks; or `cuda` is asked for and there is none.
    """
    if asked == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if asked == "cuda" or gpus_here():
            raise UserError(_unusable())
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"expected a GPU for each rank of this node; found {count} for "
            f"{os.environ.get('LOCAL_WORLD_SIZE', local + 1)} ranks: start fewer ranks, or give --device cpu"
        )
    return torch.device("cuda", local)


def describe(device: torch.device) -> str:
    """The device in words, with the versions that decide whether it works."""
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    driver = driver_version() or "unknown"
    return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda}, driver {driver})"


def dense_tflops(device: torch.device) -> float | None:
    """The chip's rate of dense bf16 products in 10^12 operations a second, by its maker; None for one not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for words, rate in DENSE_TFLOPS if re.search(words, name)), None)


def gpus_here() -> int:
    """How many NVIDIA GPUs this machine shows this process, whether or not torch can use them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in HIDDEN:
        return 0
    nodes = [file for file in DEV.glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    return len(nodes) or len(re.findall(r"^GPU \d", _ask("-L"), re.MULTILINE))


def driver_version() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    file = PROC / "driver/nvidia/version"
    text = file.read_text() if file.is_file() else _ask("--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return found[1] if found else None


def _ask(*words: str) -> str:
    """What nvidia-smi answers, "" where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *words], capture_output=True, text=True, timeout=60.0).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _unusable() -> str:
    """The sentence about GPUs that torch cannot use."""
    count, driver = gpus_here(), driver_version()
    if not count:
        return "expected a GPU for --device cuda; found none here: leave --device out, or start on a node with GPUs"
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    major = int(driver.partition(".")[0]) if driver else 0
    index = next((name for oldest, name in INDEXES if major >= oldest), None)
    release = torch.__version__.partition("+")[0]
    remedy = f"`pip install --force-reinstall torch=={release} --index-url {WHEELS}/{index}`"
    if index is None:
        remedy = "a driver of 525 or newer, and torch for its CUDA"
    elif torch.version.cuda and index[2:].startswith(torch.version.cuda.partition(".")[0]):
        remedy = "access to them (`nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` say more)"
    return (
        f"expected torch to use the {count} GPU(s) of this machine; found that it cannot: torch {torch.__version__} is "
        f"built {built}, the driver is {driver or 'unknown'}: it needs {remedy}; or compute without, with --device cpu"
    )
