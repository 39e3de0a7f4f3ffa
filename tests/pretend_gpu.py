"""A step of a run on a pretend GPU: tensors of shapes and dtypes alone, on a device of their own.

    python tests/pretend_gpu.py '{"optimizer": "muon", "shard": "full"}' [method] [ranks]

The device comes from torch's Python back end (private, so this is for one torch version, `TORCH`). An operation on
tensors of both devices is an error, and backward runs in a thread of the device, as on a real GPU and not on a CPU.
Prints as JSON how often the step copied to the device, waited for a copy, and asked for a number of it.
"""

import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TORCH = "2.13"
NEOX = {
    "model_type": "gpt_neox",
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


class Stream:
    """Everything is done in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: Any) -> "Event":
        return Event()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """Nothing is waited for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> "Event":
        return self

    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class Device(ModuleType):
    """What torch asks of the module of a device."""

    Stream, Event = Stream, Event

    class device:  # noqa: N801, torch's name
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> "Device.device":
            return self

        def __exit__(self, *_: Any) -> None: ...

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...
    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...
    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> Stream:
        return Stream()

    def synchronize(self, *_: Any) -> None: ...
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Traffic(TorchDispatchMode):
    """Counts what passes between the host and the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.found = device, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device == self.device for tensor in here)
        if func.overloadpacket is torch.ops.aten._local_scalar_dense and on_device:
            self.found["numbers read"] += 1
        output = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten._to_copy and here:
            devices = (here[0].device, output.device)
            if devices[0] != devices[1]:
                kind = "copies" if kwargs.get("non_blocking") else "copies waited for"
                self.found[kind] += 1
        return output


def pretend_device() -> torch.device:
    """Make the device `fakegpu`; once a process."""
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend("fakegpu", Device("torch.fakegpu"))
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        found: Tensor = torch._C._acc.create_empty_tensor(tuple(size), dtype or torch.float32)  # type: ignore[attr-defined]
        return found

    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, non_blocking=False: target, "PrivateUse1")
    pretend_device.library = library  # type: ignore[attr-defined]  # it unregisters when it is collected
    return torch.device("fakegpu", 0)


def without_real_numbers() -> None:
    """Replace what reads numbers, or moves what is not there yet, in this process."""
    import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp_init

    import unlearn.optim.muon as muon

    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # no tensor keeps its numbers
    fsdp_init._move_states_to_device = lambda *_, **__: None
    layout_of = muon.layout_of

    def really(name: str, parameter: Tensor) -> Any:
        with unset_fake_temporarily():
            return layout_of(name, parameter)

    muon.layout_of = really
    muon._root_mean_squares = lambda named, layouts: {name: 1.0 for name, _, _ in named}
    Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]


def step_of(flags: Mapping[str, Any], method: str, ranks: int) -> dict[str, int]:
    """One optimizer step of a method; the traffic between host and device in it, after the first."""
    device = pretend_device()
    without_real_numbers()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    from unlearn.blank import blank_lens, full_windows, needs_of
    from unlearn.building import method_parts, method_terms, optimizers_of, original_model, precision, trained_model
    from unlearn.config import configure
    from unlearn.methods.terms import Loss
    from unlearn.sharding import shard_mesh
    from unlearn.trainer import clip_gradients, gradients
    from unlearn.weights import materialise

    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(NEOX))
    config = configure(method, model=folder, seq_len=64, **flags)
    mesh = shard_mesh(config.shard_kind(ranks), config.shard_size, device)
    model, original = trained_model(config, mesh), original_model(config, mesh, needs_of(config))
    windows = full_windows(config, ranks, micro_batches=2)
    threads: set[str] = set()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for one in (model, original):
            if one is not None:
                for part in one.modules():
                    part._buffers.update(
                        {name: fake.from_tensor(found) for name, found in part._buffers.items() if found is not None}
                    )
                on_host = one is original and config.offload_reference
                materialise(one, torch.device("cpu") if on_host else device, buffers=device)
        parts = method_parts(config, model, original, windows, partial(blank_lens, config, device=device), device)
        terms = method_terms(config, parts)
        assert config.dtype == "fp32" or mesh is not None or config.lora_rank, "the device has no autocast"
        loss = Loss(terms, precision(config, mesh, device), [] if original is None else [original])
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_hook(lambda gradient: threads.add(threading.current_thread().name))
        built = optimizers_of(config, model)
        with Traffic(device) as traffic:
            gradients(model, loss, 1, 2)
            clip_gradients(trained, 1.0, torch.ones((), device=device))
            for name, optimizer in built.items():
                if name == "muon":
                    optimizer.step()
        assert all(parameter.grad is None or parameter.grad.device == device for parameter in trained)
    return dict(traffic.found) | {"threads": sorted(threads)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = json.loads(sys.argv[1])
    print(json.dumps(step_of(chosen, *(sys.argv[2:3] or ["lens"]), ranks=int((sys.argv[3:4] or ["4"])[0]))))
    sys.stdout.flush()
    os._exit(0)  # collecting tensors without data after their process group may crash the interpreter
