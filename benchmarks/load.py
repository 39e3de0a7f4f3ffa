"""Host memory of reading a model onto two ranks: every rank its own rows, against `from_pretrained` and then sharding.

    python benchmarks/load.py

A random GPT-NeoX of 254 M parameters in float32 (1,016 MB) is written once; then two gloo ranks read it in each way,
each way in fresh processes. Reported is the highest resident memory of a rank above what it had after its imports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 50304,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=("ours", "from_pretrained"), help="run one rank of one way (used internally)")
    parser.add_argument("--folder", help="the model (used internally)")
    arguments = parser.parse_args()
    if arguments.way:
        return rank(arguments.way, arguments.folder)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        found = {way: measure(way, folder) for way in ("from_pretrained", "ours")}
    for way, mebibytes in found.items():
        print(f"{way:16} {mebibytes:7.0f} MiB a rank above the base process")
    print(f"ours / from_pretrained: {found['ours'] / found['from_pretrained']:.2f}")


def write(folder: str) -> None:
    """A random model of the shape above."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).save_pretrained(folder)


def measure(way: str, folder: str) -> float:
    """MiB of the fuller of two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [__file__, "--way", way, "--folder", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return max(float(line.split()[1]) for line in output.splitlines() if line.startswith("peak "))


def rank(way: str, folder: str) -> None:
    """Read the model in one way; print this rank's highest resident memory above its imports, in MiB."""
    import torch
    from transformers import AutoModelForCausalLM

    from unlearn.distributed import process_group
    from unlearn.model import empty_model
    from unlearn.sharding import shard, shard_mesh
    from unlearn.weights import Checkpoint, fill

    with process_group() as device:
        mesh = shard_mesh("full", None, device)
        assert mesh is not None
        before = resident("VmRSS")
        if way == "ours":
            model = empty_model(folder)
            shard(model, mesh, compute=torch.float32)
            fill(model, Checkpoint.open(folder), device)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
            shard(model, mesh, compute=torch.float32)
        print(f"peak {resident('VmHWM') - before:.1f}", flush=True)


def resident(key: str) -> float:
    """This process's resident memory (VmRSS) or its highest so far (VmHWM), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise ValueError(f"expected {key} in /proc/self/status; found none: this benchmark needs Linux")


if __name__ == "__main__":
    main()
