"""Every flag of `train.py`: one frozen dataclass whose docstrings are the `--help`.

A field that is None was not given; `__post_init__` fills in the published value of the chosen mode (LoRA or full
training, AdamW or Muon) and refuses a flag that would have no effect in it. Nothing here imports torch, so that
`--help` and a wrong flag answer at once.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import tyro

from unlearn.errors import UserError

FORGET = "Unlearning/WMDP-Bio-Remove-Dataset"
RETAIN = "EleutherAI/wikitext_document_level:wikitext-103-raw-v1"

# Published values (docs: "The method, exactly"): LoRA r16 with AdamW, and full training with Muon.
_LORA = {"retain_loss": "l2", "remove_coef": 5.0, "retain_coef": 5.0, "adam_lr": 1e-3, "examples": 8192}
_FULL = {"retain_loss": "kl", "remove_coef": 2.0, "retain_coef": 1.0, "adam_lr": 3e-4, "examples": 1024}

# Flags that have an effect in some modes only.
_LORA_FLAGS = ("lora_alpha", "lora_dropout", "lora_targets")
_MUON_FLAGS = ("muon_lr", "momentum", "muon_method", "muon_floor", "muon_qkv")
_EVAL_FLAGS = ("eval_every", "data_dir", "include_path", "limit", "eval_subsample")
_RETAIN_FLAGS = ("retain", "retain_column", "retain_template", "retain_loss", "retain_start")
_FORGET_FLAGS = ("forget", "forget_column", "forget_template", "lens", "forget_loss", "prompts")


@dataclass(frozen=True, kw_only=True)
class CorpusFlags:
    """Where forget and retain text come from."""

    forget: str = FORGET
    """Forget corpus: a .jsonl, .json, .csv, .parquet or .txt file (a document a line; text also .gz or .zst), a folder
    of .jsonl or .parquet files, a saved `datasets` folder, or a hub name, NAME[:CONFIG]."""
    forget_column: str | None = None
    """Text column of the forget corpus. Default: title, abstract and text joined by blank lines, else `page`. Only
    strings are text."""
    forget_template: str | None = None
    """Text of a forget document built from its columns, e.g. '{title}\\n\\n{abstract}\\n\\n{text}'; it names columns
    and nothing else."""
    retain: str = RETAIN
    """Retain corpus, in the same forms."""
    retain_column: str | None = None
    """Text column of the retain corpus. Default: as for the forget corpus."""
    retain_template: str | None = None
    """Text of a retain document built from its columns."""

    def check_text(self) -> None:
        """Raise if a column and a template are both given for one corpus."""
        for corpus in ("forget", "retain"):
            if getattr(self, f"{corpus}_column") and getattr(self, f"{corpus}_template"):
                raise UserError(f"--{corpus}-column has no effect with --{corpus}-template: give one of them")


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """What a command computes on."""

    device: Literal["cuda", "cpu"] | None = None
    """cpu: compute on the CPU though there may be GPUs; cuda: on GPUs or not at all. Default: on a GPU for each rank;
    on the CPU where the machine has no GPU, while one that torch cannot use is an error."""


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """How a run is saved, and goes on after it was stopped or killed."""

    overwrite: bool = False
    """Replace an earlier run in --output. With --resume auto: only if it is another one."""
    resume: Literal["auto", "never"] | None = None
    """auto: go on with the unfinished run of the same flags in --output, from its newest checkpoint; say so if it is
    finished. never: an earlier run is in the way. Default: auto, or never with --overwrite."""
    save_every: int = 32
    """Optimizer steps between checkpoints; there is one after the last step too. 0: only when told to stop."""
    keep: int = 1
    """Checkpoints to keep while the run lasts; a finished one has none."""
    step_timeout: float = 600.0
    """Seconds that ranks wait for each other, after the first step, before they give up."""

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run of the same flags goes on."""
        return self.resume == "auto" or (self.resume is None and not self.overwrite)

    def check_resume(self) -> None:
        """Raise unless every number is inside its range, and every flag has an effect."""
        if self.save_every < 0 or self.keep < 1 or not 0.0 < self.step_timeout < math.inf:
            raise UserError(
                "expected --save-every of 0 or more, --keep of 1 or more and --step-timeout above 0; found "
                f"{self.save_every}, {self.keep} and {self.step_timeout}"
            )
        if self.save_every == 0 and self.keep != 1:
            raise UserError("--keep has no effect with --save-every 0: leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CorpusFlags, ResumeFlags, DeviceFlags):
    """Unlearn a model: push what a frozen tuned lens reads off the target layers towards uniform on forget text, and
    hold the model to its original on retain text."""

    output: str | None = None
    """Folder of the run: config.json, run.json, metrics.jsonl, checkpoints/, model/, adapter/, evals/. Default: runs/
    and a name made of the model, LoRA or full, and the optimizer."""

    model: str = "EleutherAI/deep-ignorance-unfiltered"
    """Model to unlearn: a local folder or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    lens: str | None = None
    """Tuned lens of the model: a local folder or a hub name. Default: <model>-lens, as in the published runs."""
    layers: tuple[int, ...] = (5, 10, 15, 20, 25, 30)
    """Target layers l, in 0..L: the residual stream that enters block l; L is the final one, read without a lens.
    Published: 5 10 15 20 25 30."""
    lens_tap: Literal["input", "output"] = "input"
    """Apply translator l to the stream that enters block l (input), or to the one that leaves it (output: the
    off-by-one of earlier published runs, only for comparing with them)."""

    lora_rank: int = 0
    """Rank of the LoRA adapters; 0 trains every parameter. Published: 16."""
    lora_alpha: float | None = None
    """LoRA scale: the update is multiplied by alpha / rank. Published: 16, the default with LoRA."""
    lora_dropout: float | None = None
    """Probability of dropping an adapter's input. Published: 0.05, the default with LoRA."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers to adapt, by the last part of their name, e.g. query_key_value. Default: all in the blocks."""

    forget_loss: Literal["uniform", "sampled", "gradient-ascent"] = "uniform"
    """uniform: exact cross-entropy against the uniform distribution; sampled: against one random token a position
    (about 200 times noisier); gradient-ascent: minus the true next token's. All over ln V."""
    retain_loss: Literal["kl", "l2"] | None = None
    """kl: KL(original || model) a token, in nats; l2: distance of the residual streams at the target layers.
    Default: l2 with LoRA, kl for full training."""
    remove_coef: float | None = None
    """Weight of the forget loss; falls to 75 % of it over the run. Published: 5 with LoRA, 2 full."""
    retain_coef: float | None = None
    """Weight of the retain loss at the end of the run. Published: 5 with LoRA, 1 full."""
    retain_start: float = 0.0
    """Share of --retain-coef at the first step, from which it rises linearly. Published: 0."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything; or muon for the matrices inside the blocks (and the adapters), adamw for the rest."""
    adam_lr: float | None = None
    """Peak learning rate of AdamW. Published: 1e-3 with LoRA, 3e-4 full."""
    muon_lr: float | None = None
    """Peak learning rate of Muon. Published: 1e-3."""
    momentum: float | None = None
    """Momentum of Muon (Nesterov). Published: 0.95."""
    muon_method: Literal["gram", "polar-express", "quintic"] | None = None
    """How Muon orthogonalises: gram, the least work; polar-express, the same polynomials in standard form; quintic,
    less exact, torch.optim.Muon's bits. Default: gram."""
    muon_floor: float | None = None
    """Singular values of a matrix's direction that are below this share of its greatest pass in proportion, instead of
    being lifted to full size: rounding is not trained on. Up to a short side of 64 exactly; above, about, and of up to
    2.8 times the greatest. 0: lift them all, as torch.optim.Muon does. Default: 0.01, and 0 with quintic."""
    muon_qkv: Literal["fused", "split", "per-head"] | None = None
    """What Muon orthogonalises of GPT-NeoX's fused query_key_value, in full training: the whole; Q, K and V each; or
    each head's q, k and v. Default: fused."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and embeddings. Published: 0.01."""
    clip: float = 1.0
    """Largest norm of the whole gradient; inf to leave it alone. Published: 1.0."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises to its peak; it then falls linearly to 0."""

    examples: int | None = None
    """Windows drawn from each corpus for an epoch. Published: 8192 with LoRA, 1024 full."""
    epochs: int = 1
    """Passes over the forget windows. Published: 1."""
    batch: int = 32
    """Forget windows, and retain windows, of one optimizer step, over all ranks. Published: 32."""
    micro_batch: int | None = None
    """Most windows of one forward pass on one rank; changes memory and speed, not the result."""
    micro_tokens: int | None = None
    """Most tokens, padding included, of one forward pass on one rank: packs short windows together, instead of
    counting them as --micro-batch does."""
    seq_len: int = 2048
    """Longest window, in tokens; longer documents become several windows."""
    seed: int = 0
    """Of the data order, the adapters' initial values, dropout and sampled targets."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the computation and the exported weights; trained weights, losses and statistics are float32 in both."""

    shard: Literal["full", "hybrid", "replicate"] | None = None
    """full: every rank holds a share of the model (FSDP2); hybrid: the ranks of a node share one copy, each node has
    one; replicate: every rank has all of it. Default: full for full training on several ranks, else replicate."""
    shard_size: int | None = None
    """Ranks that share one copy under --shard hybrid. Default: the ranks of a node."""
    offload_reference: bool = False
    """Keep the sharded original model of full training in host memory, and copy it to the GPU as it is needed."""
    checkpoint_activations: bool = True
    """Keep only each block's input for the backward pass and recompute the rest: less memory, a third more
    arithmetic, the same result."""
    compile_blocks: bool = False
    """Compile each block: faster steps, after minutes of compilation for every new length of window."""

    eval_tasks: tuple[str, ...] = ()
    """lm-eval tasks to measure on the live model after the last step, e.g. wmdp_bio mmlu_stem; also with commas
    between."""
    eval_every: int | None = None
    """Optimizer steps between further evaluations, the first before step 0."""
    data_dir: str | None = None
    """Local data of the tasks, DIR/cais/wmdp/wmdp-bio/test-*.parquet; default: the hub."""
    include_path: str | None = None
    """Folder with further lm-eval task definitions."""
    limit: int | None = None
    """Evaluate only the first N questions of each task."""
    eval_subsample: int | None = None
    """Evaluate only N questions of each of --eval-tasks, shared out among its subjects, the same ones every time."""
    prompts: tuple[str, ...] = ()
    """Texts to read with the lens at every layer, before the first step and after the last, for the report; written to
    lens.json."""
    log_every: int = 1
    """Optimizer steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_tasks", tuple(split_names(self.eval_tasks)))
        self._refuse_idle_flags()
        self.check_resume()
        for name, value in self._mode_defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_numbers(self)
        if not self.uses_layers and self.layers != _default("layers"):
            raise UserError("--layers has no effect with --remove-coef 0 and --retain-loss kl: leave it out")

    def _mode_defaults(self) -> dict[str, Any]:
        """The published value of every flag that has an effect in this mode and a default that depends on it."""
        defaults: dict[str, Any] = dict(_LORA if self.lora_rank > 0 else _FULL)
        if not self.uses_adam:
            del defaults["adam_lr"]
        if self.lora_rank > 0:
            defaults |= {"lora_alpha": 16.0, "lora_dropout": 0.05}
        if self.optimizer == "muon":
            defaults |= {"muon_lr": 1e-3, "momentum": 0.95, "muon_method": "gram", "muon_qkv": "fused"}
            defaults["muon_floor"] = 0.0 if self.muon_method == "quintic" else 0.01
        if self.micro_tokens is None:
            defaults["micro_batch"] = 1
        if self.retain_coef == 0.0:
            del defaults["retain_loss"]
        if self.remove_coef != 0.0:
            defaults["lens"] = self._default_lens
        kind = f"lora{self.lora_rank}" if self.lora_rank > 0 else "full"
        defaults["output"] = f"runs/{self.model.rstrip('/').rpartition('/')[2]}-{kind}-{self.optimizer}"
        return defaults

    @property
    def _default_lens(self) -> str:
        return f"{self.model.rstrip('/')}-lens"

    @property
    def uses_adam(self) -> bool:
        """Whether AdamW gets any parameter: under Muon, LoRA leaves it none."""
        return not (self.optimizer == "muon" and self.lora_rank > 0)

    @property
    def uses_layers(self) -> bool:
        """Whether a loss is read at target layers: the divergence from the original is not."""
        return not (self.remove_coef == 0.0 and self.retain_loss == "kl")

    def _refuse_idle_flags(self) -> None:
        """Raise if a flag was given that this mode would ignore."""
        idle = [
            (self.lora_rank == 0, "without --lora-rank", _LORA_FLAGS),
            (self.optimizer != "muon", "without --optimizer muon", _MUON_FLAGS),
            (self.lora_rank > 0, "with LoRA, whose matrices are not fused", ("muon_qkv",)),
            (not self.uses_adam, "with --optimizer muon and LoRA", ("adam_lr",)),
            (self.muon_method == "quintic" and self.muon_floor != 0.0, "with --muon-method quintic", ("muon_floor",)),
            (not self.eval_tasks, "without --eval-tasks", _EVAL_FLAGS),
            (self.retain_coef == 0.0, "with --retain-coef 0", _RETAIN_FLAGS),
            (self.remove_coef == 0.0, "with --remove-coef 0", _FORGET_FLAGS),
            (self.micro_tokens is not None, "with --micro-tokens", ("micro_batch",)),
            (self.shard != "hybrid", "without --shard hybrid", ("shard_size",)),
            (self.lora_rank > 0, "with LoRA, whose original is the model without adapters", ("offload_reference",)),
            (self.shard == "replicate", "with --shard replicate", ("offload_reference",)),
            (self.retain_coef == 0.0, "with --retain-coef 0", ("offload_reference",)),
        ]
        for condition, reason, names in idle:
            for name in names:
                if condition and getattr(self, name) != _default(name):
                    raise UserError(f"--{name.replace('_', '-')} has no effect {reason}: leave it out")
        check_once("--eval-tasks", self.eval_tasks)
        if self.limit is not None and self.eval_subsample is not None:
            raise UserError("--limit has no effect beside --eval-subsample: give one of them")
        self.check_text()

    def shard_kind(self, world_size: int) -> Literal["full", "hybrid", "replicate"]:
        """How the model is laid out over `world_size` ranks."""
        return self.shard or ("full" if self.lora_rank == 0 and world_size > 1 else "replicate")

    def check_depth(self, depth: int) -> None:
        """Raise unless every target layer exists in a model of `depth` blocks, or none is looked at."""
        if not self.uses_layers:
            return
        highest = depth - 1 if self.lens_tap == "output" else depth
        for layer in self.layers:
            if not 0 <= layer <= highest:
                raise UserError(
                    f"expected --layers in 0..{highest} (the model has {depth} blocks); found {layer}: choose others"
                )
        if set(self.layers) == {depth} and self.lens not in (None, self._default_lens):
            raise UserError(f"--lens has no effect with --layers {depth}, the final stream: leave it out")


def split_names(names: Sequence[str]) -> list[str]:
    """The names in `names`, some of which may be joined with commas as lm-eval's command line wants them."""
    return [name for word in names for name in word.split(",") if name]


def check_once(flag: str, names: Sequence[str]) -> None:
    """Raise if a name is given twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"expected every name after {flag} once; found {twice!r} twice: leave one out")


Flags = TypeVar("Flags")


def parse_flags(flags: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """Read a flags dataclass from the command line; a mistake is shown by rank 0 only and exits with code 2."""
    return tyro.cli(flags, args=arguments, console_outputs=os.environ.get("RANK", "0") == "0")


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(TrainConfig) if field.name == name)


def _check_numbers(config: TrainConfig) -> None:
    """Raise unless every number is inside its range."""
    expectations: dict[str, tuple[bool, str]] = {
        "layers": (len(set(config.layers)) == len(config.layers) > 0, "one or more different layers"),
        "lora_rank": (config.lora_rank >= 0, "0 or more"),
        "lora_alpha": (_positive(config.lora_alpha), "a number above 0"),
        "lora_dropout": (config.lora_dropout is None or 0.0 <= config.lora_dropout < 1.0, "a number in [0, 1)"),
        "remove_coef": (_coefficient(config.remove_coef), "a finite number, 0 or more"),
        "retain_coef": (_coefficient(config.retain_coef), "a finite number, 0 or more"),
        "retain_start": (0.0 <= config.retain_start <= 1.0, "a number in [0, 1]"),
        "adam_lr": (_positive(config.adam_lr), "a number above 0"),
        "muon_lr": (_positive(config.muon_lr), "a number above 0"),
        "momentum": (config.momentum is None or 0.0 <= config.momentum < 1.0, "a number in [0, 1)"),
        "muon_floor": (config.muon_floor is None or 0.0 <= config.muon_floor <= 0.1, "a number in [0, 0.1]"),
        "weight_decay": (_coefficient(config.weight_decay), "a finite number, 0 or more"),
        "clip": (config.clip > 0.0, "a number above 0, or inf"),
        "warmup_ratio": (0.0 <= config.warmup_ratio < 1.0, "a number in [0, 1)"),
        "seq_len": (config.seq_len >= 3, "3 or more"),
        "seed": (config.seed >= 0, "0 or more"),
        "prompts": (all(prompt.strip() for prompt in config.prompts), "texts, none of them empty"),
    }
    counts = ("examples", "epochs", "batch", "micro_batch", "micro_tokens", "eval_every", "limit", "eval_subsample")
    for name in (*counts, "log_every"):
        value = getattr(config, name)
        expectations[name] = (value is None or value >= 1, "1 or more")
    for name, (holds, expected) in expectations.items():
        if not holds:
            raise UserError(f"expected --{name.replace('_', '-')} to be {expected}; found {getattr(config, name)}")
    if config.remove_coef == 0.0 and config.retain_coef == 0.0:
        raise UserError("expected --remove-coef or --retain-coef above 0; found both 0: there is nothing to train on")


def _positive(value: float | None) -> bool:
    return value is None or (value > 0.0 and math.isfinite(value))


def _coefficient(value: float | None) -> bool:
    return value is None or (value >= 0.0 and math.isfinite(value))
