"""Flags of `python -m unlearn plan`: those of `train.py`, and of the machine to plan for. Imports no torch."""

from dataclasses import dataclass

from unlearn.config import TrainConfig
from unlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Say what a run will need before it starts: the peak memory of a GPU by term, arithmetic and time, for the run
    that the other flags (those of train.py) describe and for its neighbours. Of the model only config.json is read."""

    world_size: int = 4
    """GPUs of the run."""
    gpus_per_node: int = 4
    """GPUs of one node, which share a copy of the model under --shard hybrid."""
    gpu_gib: float = 88.0
    """Memory to plan with on one GPU, in GiB: a GH200 offers 94.9, less context and fragmentation."""
    tflops: float = 350.0
    """Sustained rate of one GPU, in 10^12 floating-point operations a second, for the estimate of time."""
    verify: bool = False
    """Also run two micro-batches of the true shape on tensors without data, and print the peak that gives."""
    json: bool = False
    """Print one JSON object instead of the tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("world_size", "gpus_per_node", "gpu_gib", "tflops"):
            if not getattr(self, name) > 0:
                flag = name.replace("_", "-")
                raise UserError(f"expected --{flag} to be above 0; found {getattr(self, name)}: give what you have")
        for name in ("batch", "examples"):
            if (getattr(self, name) or 0) < self.world_size:
                raise UserError(
                    f"expected --{name} of at least one window a rank ({self.world_size:,} ranks); found "
                    f"{getattr(self, name):,}: raise it, or lower --world-size"
                )
