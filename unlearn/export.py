"""What a run writes beside its log: the model and its adapter, and what the lens reads before and after."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.assemble import Unlearning
from unlearn.building import ModelFlags, run_lens
from unlearn.distributed import fail_together, is_main
from unlearn.files import absolute_model
from unlearn.lens_readings import Stage, read_prompts, write_stage
from unlearn.lora import merge_lora, save_adapter
from unlearn.model import cast_parameters, save_model
from unlearn.precision import DTYPES
from unlearn.sharding import is_sharded, reshard
from unlearn.weights import shared_folder


def export_bytes(run: Unlearning) -> int:
    """Size of what `finish` writes, but for the adapter."""
    if not run.config.export:
        return 0
    return sum(parameter.numel() for parameter in run.model.parameters()) * DTYPES[run.config.dtype].itemsize


def read_lens(run: Unlearning, folder: Path, stage: Stage) -> None:
    """Read --prompts at every layer of the live model, for `folder`/lens.json. Every rank must call it.

    The lens is in memory at all layers for no longer than this takes, and nothing random is drawn.
    """
    config, training = run.config, run.model.training
    prompts = getattr(config, "prompts", ())
    if not prompts:
        return
    lens = run_lens(config, next(run.model.parameters()).device, None)
    run.model.eval()
    readings = read_prompts(run.model, lens, run.tokenizer, prompts, stage, run.precision)
    reshard(run.model)  # the passes ended early: the root's tied embedding would stay gathered, and no longer sharded
    run.model.train(training)
    with fail_together():
        if is_main():
            write_stage(folder, lens, str(config.lens), readings, stage)  # type: ignore[attr-defined]


def finish(run: Unlearning, folder: Path) -> None:
    """Write `adapter/`, then turn the live model into what is exported (adapters merged, weights in --dtype) and write
    `model/`, in place of what an earlier attempt left. After this, the live model and the exported one are the same,
    and --prompts are read in it. With --no-export nothing is written, and the model stays as it is."""
    if run.config.export:
        write_result(run.model, run.tokenizer, folder, run.config)
        read_lens(run, folder, "after")


def write_result(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, config: ModelFlags) -> None:
    """Write `adapter/` of a trained model, then turn it into what is exported and write `model/`; see `finish`."""
    if config.lora_rank > 0:
        with shared_folder(folder / "adapter", replace=True) as temporary:
            save_adapter(model, temporary, absolute_model(config.model))
        merge_lora(model)
    dtype = DTYPES[config.dtype]
    if not is_sharded(model):  # a sharded model computes with its weights rounded as they are exported
        cast_parameters(model, dtype)
    with shared_folder(folder / "model", replace=True) as temporary:
        save_model(model, tokenizer, temporary, dtype)
