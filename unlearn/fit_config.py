"""The flags of `python -m unlearn fit-lens`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

from unlearn.config import CorpusFlags, DeviceFlags
from unlearn.config_file import FileFlags
from unlearn.errors import UserError
from unlearn.resume_config import ResumeFlags


@dataclass(frozen=True, kw_only=True)
class FitLensConfig(CorpusFlags, ResumeFlags, DeviceFlags, FileFlags):
    """Train a tuned lens for a model, on forget and retain text together."""

    model: str
    """Model to read: a local folder or a hub name."""
    output: str
    """New folder for the lens: params.safetensors, params.pt, config.json, fit.json; fitting/ is for going on."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    layers: tuple[int, ...] = ()
    """Layers l to fit, in 0..L-1; a method's target layers are enough for it. Default: all."""
    steps: int = 250
    """Optimizer steps. Published lenses: 250."""
    batch: int = 32
    """Windows of one optimizer step, over all ranks."""
    micro_batch: int = 1
    """Windows of one forward pass on one rank; changes memory and speed, not the result."""
    seq_len: int = 2048
    """Longest window, in tokens."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Of the data order."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the model's computation, its unembedding, and the lens on disk; the translators are trained in float32."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"expected --{name.replace('_', '-')} to be 1 or more; found {getattr(self, name)}")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"expected every layer after --layers once; found {self.layers}")
        self.check_text()
        self.check_resume()
        if not 0.0 < self.lr < float("inf"):
            raise UserError(f"expected --lr above 0; found {self.lr}")
        if self.seq_len < 3 or self.seed < 0:
            raise UserError(f"expected --seq-len >= 3 and --seed >= 0; found {self.seq_len} and {self.seed}")
