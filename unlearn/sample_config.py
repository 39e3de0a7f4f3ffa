"""The flags of `python -m unlearn sample`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

from unlearn.config import DeviceFlags
from unlearn.config_file import FileFlags
from unlearn.errors import UserError
from unlearn.flags import flag, settle


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DeviceFlags, FileFlags):
    """Sample a corpus from a model itself, for example to retain what it writes.

    Stopped or killed, the same command goes on, to the same texts; so it does at another number of ranks.
    """

    model: str
    """Model to sample from: a local folder or a hub name."""
    output: str
    """New file of texts, ending in .jsonl or .parquet: columns text, index and tokens."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    examples: int = flag(1024, least=1)
    """How many texts to sample."""
    tokens: int = flag(256, least=1)
    """Most new tokens of a text; it ends earlier where the model ends it."""
    start: str = ""
    """What every text begins with, and is written with. Default: only the token that begins or ends a document."""
    temperature: float = flag(1.0, above=0.0)
    """Divides the logits: below 1 likelier tokens are preferred."""
    top_p: float = flag(1.0, above=0.0, most=1.0)
    """Sample among the likeliest tokens that together have this probability (https://arxiv.org/abs/1904.09751)."""
    batch: int = flag(32, least=1)
    """Texts sampled at once on one rank."""
    seed: int = flag(0, least=0)
    """Of the texts: text i depends on the seed and i, never on the ranks."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights and the computation. Probabilities are float32 in either case."""
    overwrite: bool = False
    """Replace an earlier file in --output, or what an unfinished command with other flags left."""

    def __post_init__(self) -> None:
        settle(self)
        if not self.output.endswith((".jsonl", ".parquet")):
            raise UserError(f"expected --output to end in .jsonl or .parquet; found {self.output}: rename it")
