"""Weights on disk: safetensors in Hugging Face's layout, of which each rank reads and writes no more than it holds.

A model is built on the meta device, adapted and sharded there, and only then given memory: every rank reads its own
rows of every matrix from the files, one tensor at a time. Export goes the other way: one tensor at a time is gathered
to the rank that writes the file it belongs to. The whole model is never in one host's memory on its way.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from unlearn.distributed import barrier, fail_together, is_main, rank, world_size
from unlearn.errors import UserError
from unlearn.files import atomic_folder, temporary_name, write_json, writing
from unlearn.model_files import INDEX, SINGLE, Checkpoint, disk_key
from unlearn.progress import progress

FILE_BYTES = 2 << 30  # of one file of an export: what one rank has in host memory while it writes
# What older checkpoints hold beside the parameters, which this version of the model makes itself.
HARMLESS = (r"\.inv_freq$", r"\.masked_bias$", r"(^|\.)position_ids$")


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Let every parameter that a module registers within the block be one on the meta device.

    The rest of a module (rotary frequencies above all, which no checkpoint stores) is built as usual.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


Initial = Callable[[str], Tensor | None]  # a parameter that no checkpoint has: its whole value, by name


def fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    part: nn.Module | None = None,
    buffers: torch.device | None = None,
    initial: Initial = lambda name: None,
) -> None:
    """Give `model` memory on `device` and its weights from `checkpoint`; a sharded one reads each rank's rows alone.

    Args:
        part: fill only the parameters of this submodule; the others stay without memory.
        buffers: where the buffers go, if not to `device`.
        initial: values of parameters that the checkpoint lacks (adapters), asked for those alone.

    Raises:
        UserError: a tensor is missing, of another shape, no float, damaged, or holds NaN or infinity; or there are
            tensors that the model has no place for.
    """
    keys = _keys(model, checkpoint)
    if part is None:
        _refuse_surplus(model, checkpoint, set(keys.values()))
    target = model if part is None else part
    materialise(target, device, buffers)
    if part is None:
        model.tie_weights()
    wanted = {id(parameter) for parameter in target.parameters()}
    missing = []
    for name, parameter in _shown(model, wanted, checkpoint.path):
        local, first = local_rows(parameter)
        value = initial(name)
        if value is not None:
            local.copy_(value[first : first + local.shape[0]])
        elif name in keys:
            checkpoint.read_into(local, keys[name], first, parameter.shape)
        else:
            missing.append(_plain(name))
            continue
        if not _finite(local):
            raise UserError(
                f"expected finite weights in {checkpoint.path}; found NaN or infinity in {_plain(name)}: use another "
                "checkpoint"
            )
    if missing:
        raise UserError(
            f"expected every tensor of the model in {checkpoint.path}; found {len(missing)} missing "
            f"({', '.join(missing[:3])}): the files are incomplete or not of this model, fetch them again"
        )


def _shown(model: PreTrainedModel, wanted: set[int], path: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The wanted parameters by name; a bar shows how many have been read, where it takes more than a moment."""
    with progress(len(wanted), f"loading {path}", "tensor", delay=1.0) as bar:
        for name, parameter in model.named_parameters():
            if id(parameter) in wanted:
                yield name, parameter
                bar.update()


def _plain(name: str) -> str:
    """A parameter's name without the layer that an adapter puts around a linear one."""
    return name.replace(".base.", ".")


def _keys(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """{name in memory: name on disk} of every parameter that the checkpoint has; tied ones share what there is."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name: checkpoint.key(_plain(name), model.config) for name in names}
    for name, twin in _tied(model).items():
        own, other = found.get(name), found.get(twin)
        if own is None or other is None:
            found[name] = found[twin] = own or other
        elif own != other and not checkpoint.same(own, other):
            raise UserError(
                f"expected one matrix for embedding and unembedding in {checkpoint.path}; found two different ones "
                "that were not there when the model was built: start again"
            )
    return {name: key for name, key in found.items() if key is not None}


def _refuse_surplus(model: PreTrainedModel, checkpoint: Checkpoint, used: set[str]) -> None:
    """Raise if the files hold tensors that the model has no place for: it is another one than they were saved from."""
    used = used | {key for name, _ in model.named_buffers() if (key := checkpoint.key(name, model.config))}
    harmless = re.compile("|".join((*HARMLESS, *(model._keys_to_ignore_on_load_unexpected or ()))))
    surplus = sorted(key for key in checkpoint.files if key not in used and harmless.search(key) is None)
    if surplus:
        raise UserError(
            f"expected only tensors of the model that config.json describes in {checkpoint.path}; found {len(surplus)} "
            f"more ({', '.join(surplus[:3])}): use the config.json of these weights, or save them without these tensors"
        )


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """{the unembedding's name: the embedding's} in a model that ties them: its files have one of the two."""
    if not model.config.tie_word_embeddings:
        return {}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return {names[id(model.get_output_embeddings())]: names[id(model.get_input_embeddings())]}


def untie_if_stored(model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Clear a configuration's tied flag where the files hold two different matrices, as transformers does; whether so.

    The model must then be built anew.
    """
    for names in _tied(model).items():
        head, embedding = (checkpoint.key(name, model.config) for name in names)
        if head is not None and embedding is not None and head != embedding and not checkpoint.same(head, embedding):
            model.config.tie_word_embeddings = False
            return True
    return False


def _finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; `torch.isfinite` would need as much memory again."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def materialise(module: nn.Module, device: torch.device, buffers: torch.device | None = None) -> None:
    """Memory on `device` for every parameter of `module`; buffers move there, or to `buffers`, with their values."""
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    kept = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    if sharded:
        module.to_empty(device=device)  # FSDP2 notices; for its buffers' values see below
    else:
        _replace_parameters(module, device)
    for part, name, buffer in kept:
        part._buffers[name] = None if buffer is None else buffer.to(buffers or device)


def _replace_parameters(module: nn.Module, device: torch.device) -> None:
    """A new parameter for each one of `module`; what was tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]


@torch.no_grad()
def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, and which of its rows comes first: (rows [n, ..], first).

    FSDP2 shards rows: with S shards, rank s holds the s-th of the chunks of ceil(m / S) rows that `torch.chunk` makes.
    """
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    local, first = parameter.to_local(), 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0 and first == 0, "one mesh dimension shards rows, the others replicate"
            chunk = -(-parameter.shape[0] // parameter.device_mesh.size(dimension))
            first = min(parameter.shape[0], chunk * parameter.device_mesh.get_local_rank(dimension))
    return local, first


def export_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write every parameter in `dtype` into `folder`, as safetensors files of at most about 2 GiB and an index.

    Ranks write different files; a sharded parameter is gathered for its file alone, and leaves the other ranks at once.
    Every rank must call this, and `folder` must be there.
    """
    names = {name: parameter for name, parameter in model.named_parameters()}
    files = _split_files(names, dtype)
    for number, members in enumerate(files):
        mine = number % world_size() == rank()
        tensors: dict[str, Tensor] = {}
        for name in members:
            whole = full(names[name].detach())
            if mine:
                tensors[disk_key(name, model.config)] = whole.to(dtype).cpu().contiguous()
        with fail_together():
            if mine:
                file = folder / _file_name(number, len(files))
                with writing(file):
                    save_tensors(tensors, file)
    if rank() == 0 and len(files) > 1:
        where = {
            disk_key(name, model.config): _file_name(number, len(files))
            for number, members in enumerate(files)
            for name in members
        }
        size = sum(parameter.numel() for parameter in names.values()) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that whoever may read the other files beside it may read too.

    The library writes to a temporary file of its own, which is for its owner alone whatever the umask says.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def _split_files(names: dict[str, nn.Parameter], dtype: torch.dtype) -> list[list[str]]:
    """Tensors in the model's order, in files of at most `FILE_BYTES` (more only for a single larger tensor)."""
    files: list[list[str]] = []
    size = 0
    for name, parameter in names.items():
        count = parameter.numel() * dtype.itemsize
        if not files or size + count > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += count
    return files


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


@contextmanager
def shared_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """`files.atomic_folder` for all ranks together: they write into one temporary folder, which rank 0 renames.

    Raises:
        UserError: on every rank, if the place is not writable for one.
    """
    stack = ExitStack()
    with fail_together():
        if is_main():
            stack.enter_context(atomic_folder(folder, replace=replace))
    with stack:  # an error in the block ends rank 0's temporary folder
        yield temporary_name(folder)
        barrier()
        with fail_together():
            stack.close()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank that holds a shard must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
