"""Every flag of `train.py`: one frozen dataclass whose docstrings are the `--help`.

A field that is None was not given; `__post_init__` fills in the published value of the chosen mode (LoRA or full,
AdamW or Muon) and refuses a flag that would have no effect in it. Nothing here imports torch: `--help` is quick.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import tyro

from unlearn.adversary_config import AdversaryFlags
from unlearn.budget_config import BudgetFlags
from unlearn.config_file import FileFlags, with_file
from unlearn.errors import UserError
from unlearn.filter_config import FilterFlags
from unlearn.flags import Only, by_mode, flag, settle
from unlearn.latent_config import LatentFlags
from unlearn.methods import METHODS, flags_of
from unlearn.resume_config import ResumeFlags
from unlearn.run.command_line import program_name
from unlearn.track_config import TrackFlags

FORGET = "Unlearning/WMDP-Bio-Remove-Dataset"
RETAIN = "EleutherAI/wikitext_document_level:wikitext-103-raw-v1"

# When a flag has an effect.
LORA = Only(lambda config: config.lora_rank > 0, "without --lora-rank")
MUON = Only(lambda config: config.optimizer == "muon", "without --optimizer muon")
WITH_FLOOR = Only(lambda config: config.muon_method != "quintic", "with --muon-method quintic")
FULL = Only(lambda config: config.lora_rank == 0, "with LoRA, which trains adapters: see --lora-targets")
FUSED = Only(lambda config: config.lora_rank == 0, "with LoRA, whose matrices are not fused")
ADAM = Only(lambda config: config.uses_adam, "with --optimizer sgd, or with muon and LoRA")
SGD = Only(lambda config: config.optimizer == "sgd", "without --optimizer sgd")
EVALUATES = Only(lambda config: bool(config.eval_tasks), "without --eval-tasks")
FORGETS = Only(lambda config: getattr(config, "remove_coef", 1.0) != 0.0, "with --remove-coef 0")
HAS_RETAIN = Only(lambda config: hasattr(config, "retain_coef"), "with a method that has no retain loss")
RETAINS = Only(lambda config: getattr(config, "retain_coef", 1.0) != 0.0, "with --retain-coef 0")
READS_FORGET = Only(lambda config: "forget" not in config.unread, lambda config: config.unread["forget"])
READS_RETAIN = Only(lambda config: "retain" not in config.unread, lambda config: config.unread["retain"])
MASKED = Only(lambda config: config.forget_mask is not None, "without --forget-mask")
BUDGETED = Only(lambda config: config.retain_budget is not None, "without --retain-budget")
SCHEDULED = Only(lambda config: config.retain_budget is None, "beside --retain-budget")
COUNTS_EPOCHS = Only(lambda config: config.steps is None, "beside --steps")
HYBRID = Only(lambda config: config.shard == "hybrid", "without --shard hybrid")
COUNTED = Only(lambda config: config.micro_tokens is None, "with --micro-tokens")
COPIED = Only(lambda config: config.lora_rank == 0, "with LoRA, whose original is the model without adapters")
SHARDED = Only(lambda config: config.shard != "replicate", "with --shard replicate")


@dataclass(frozen=True, kw_only=True)
class CorpusFlags:
    """Where forget and retain text come from."""

    forget: str = flag(FORGET, only=READS_FORGET)
    """Forget corpus: a .jsonl, .json, .csv, .parquet or .txt file (a document a line; text also .gz or .zst), a folder
    of .jsonl or .parquet files, a saved `datasets` folder, or a hub name, NAME[:CONFIG]."""
    forget_column: str | None = flag(only=READS_FORGET)
    """Text column of the forget corpus. Default: title, abstract and text joined by blank lines, else `page`. Only
    strings are text."""
    forget_template: str | None = flag(only=READS_FORGET)
    """Text of a forget document built from its columns, e.g. '{title}\\n\\n{abstract}\\n\\n{text}'; it names columns
    and nothing else."""
    retain: str = flag(RETAIN, only=READS_RETAIN)
    """Retain corpus, in the same forms."""
    retain_column: str | None = flag(only=READS_RETAIN)
    """Text column of the retain corpus. Default: as for the forget corpus."""
    retain_template: str | None = flag(only=READS_RETAIN)
    """Text of a retain document built from its columns."""

    @property
    def unread(self) -> dict[str, str]:
        """Corpora that are not read, with why, as in "has no effect ..."."""
        return {}

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
class TrainConfig(
    BudgetFlags, FilterFlags, LatentFlags, AdversaryFlags, TrackFlags, CorpusFlags, ResumeFlags, DeviceFlags, FileFlags
):
    """Change a model by a method: the flags that all methods share. `config_of` adds those of the chosen one."""

    method: Literal[METHODS] = "lens"  # type: ignore[valid-type]
    """What the loss is; `--method NAME --help` shows its flags."""

    output: str | None = None
    """Folder of the run: config.json, run.json, metrics.jsonl, checkpoints/, model/, adapter/, evals/. Default: runs/
    and a name made of the model, LoRA or full, and the optimizer."""

    model: str = "EleutherAI/deep-ignorance-unfiltered"
    """Model to unlearn: a local folder or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    fresh_weights: bool = False
    """Take the model's configuration alone and draw its weights anew, from --seed: a control that never learned."""
    lora_rank: int = flag(0, least=0)
    """Rank of the LoRA adapters; 0 trains every parameter. Published: 16."""
    lora_alpha: float | None = flag(published=16.0, above=0.0, only=LORA)
    """LoRA scale: the update is multiplied by alpha / rank. Published: 16, the default with LoRA."""
    lora_dropout: float | None = flag(published=0.05, least=0.0, below=1.0, only=LORA)
    """Probability of dropping an adapter's input. Published: 0.05, the default with LoRA."""
    lora_targets: tuple[str, ...] = flag((), only=LORA)
    """Linear layers to adapt, by the last part of their name, e.g. query_key_value. Default: all in the blocks."""
    lora_layers: tuple[int, ...] = flag((), only=LORA)
    """Blocks whose layers are adapted, from 0. Default: all."""
    train: str | None = flag(only=FULL)
    """Regular expression for the names of the parameters that full training trains, e.g. 'mlp' or 'layers\\.[56]\\.';
    the others stay as they are. Default: all."""

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """adamw or sgd (without momentum) for everything; or muon for the matrices inside the blocks (and the adapters),
    adamw for the rest."""
    adam_lr: float | None = flag(published=by_mode(lora=1e-3, full=3e-4), above=0.0, only=ADAM)
    """Peak learning rate of AdamW. Published: 1e-3 with LoRA, 3e-4 full."""
    sgd_lr: float | None = flag(published=0.2, above=0.0, only=SGD)
    """Peak learning rate of SGD. Published: 0.2, of normalised gradients (https://arxiv.org/abs/2509.11816)."""
    muon_lr: float | None = flag(published=1e-3, above=0.0, only=MUON)
    """Peak learning rate of Muon. Published: 1e-3."""
    momentum: float | None = flag(published=0.95, least=0.0, below=1.0, only=MUON)
    """Momentum of Muon (Nesterov). Published: 0.95."""
    muon_method: Literal["gram", "polar-express", "quintic"] | None = flag(published="gram", only=MUON)
    """How Muon orthogonalises: gram, the least work; polar-express, the same polynomials in standard form; quintic,
    less exact, torch.optim.Muon's bits. Default: gram."""
    muon_floor: float | None = flag(published=0.01, least=0.0, most=0.1, only=(MUON, WITH_FLOOR))
    """Singular values of a matrix's direction that are below this share of its greatest pass in proportion, instead of
    being lifted to full size: rounding is not trained on. Up to a short side of 64 exactly; above, about, and of up to
    2.8 times the greatest. 0: lift them all, as torch.optim.Muon does. Default: 0.01, and 0 with quintic."""
    muon_qkv: Literal["fused", "split", "per-head"] | None = flag(published="fused", only=(MUON, FUSED))
    """What Muon orthogonalises of GPT-NeoX's fused query_key_value, in full training: the whole; Q, K and V each; or
    each head's q, k and v. Default: fused."""
    weight_decay: float = flag(0.01, least=0.0)
    """Decoupled weight decay of matrices and embeddings. Published: 0.01."""
    clip: float = flag(1.0, above=0.0, infinite=True)
    """Largest norm of the whole gradient; inf to leave it alone. Published: 1.0."""
    warmup_ratio: float = flag(0.0, least=0.0, below=1.0)
    """Share of the steps over which the learning rate rises to its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after its peak: stay, or fall to 0 along a line or half a cosine."""

    forget_mask: str | None = flag(only=READS_FORGET)
    """Regular expression for what counts of forget text, e.g. '(?i)pathogen|toxin': tokens that share a character with
    a match. Reaches every forget loss; windows without a match are left out. Default: all of it."""
    forget_context: int = flag(0, least=0, only=MASKED)
    """Tokens before and after a match that count too."""
    examples: int | None = flag(published=by_mode(lora=8192, full=1024), least=1)
    """Windows drawn from each corpus for an epoch. Published: 8192 with LoRA, 1024 full."""
    epochs: int = flag(1, least=1, only=COUNTS_EPOCHS)
    """Passes over the forget windows. Published: 1."""
    steps: int | None = flag(least=1)
    """Optimizer steps, in as many passes as they take, in place of --epochs."""
    batch: int = flag(32, least=1)
    """Forget windows, and retain windows, of one optimizer step, over all ranks; all of --examples where they are
    fewer. Published: 32."""
    micro_batch: int | None = flag(published=1, least=1, only=COUNTED)
    """Most windows of one forward pass on one rank; changes memory and speed, not the result."""
    micro_tokens: int | None = flag(least=1)
    """Most tokens, padding included, of one forward pass on one rank: packs short windows together, instead of
    counting them as --micro-batch does."""
    seq_len: int = flag(2048, least=3)
    """Longest window, in tokens; longer documents become several windows."""
    seed: int = flag(0, least=0)
    """Of the data order, the adapters' initial values, dropout and sampled targets."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the computation and the exported weights; trained weights, losses and statistics are float32 in both."""

    shard: Literal["full", "hybrid", "replicate"] | None = None
    """full: every rank holds a share of the model (FSDP2); hybrid: the ranks of a node share one copy, each node has
    one; replicate: each rank has all of it. Default: replicate with LoRA or alone, hybrid on several nodes, or full."""
    shard_size: int | None = flag(least=1, only=HYBRID)
    """Ranks that share one copy under --shard hybrid. Default: the ranks of a node."""
    offload_reference: bool = flag(False, only=(COPIED, SHARDED, HAS_RETAIN, RETAINS))
    """Keep the sharded original model of full training in host memory, and copy it to the GPU as it is needed."""
    checkpoint_activations: Literal["full", "selective", "none"] | None = None
    """What backward computes again, with the same result. full: all of a block but its input; selective: all but
    products and attention; none: nothing. Default: the fastest that fits into memory."""
    compile_blocks: bool = False
    """Compile each block: faster steps, after minutes of compilation for every new length of window."""

    eval_tasks: tuple[str, ...] = ()
    """lm-eval tasks to measure on the live model after the last step, e.g. wmdp_bio mmlu_stem; also with commas
    between."""
    eval_every: int | None = flag(least=1, only=EVALUATES)
    """Optimizer steps between further evaluations, the first before step 0."""
    data_dir: str | None = flag(only=EVALUATES)
    """Local data of the tasks, DIR/cais/wmdp/wmdp-bio/test-*.parquet; default: the hub."""
    include_path: str | None = flag(only=EVALUATES)
    """Folder with further lm-eval task definitions."""
    limit: int | None = flag(least=1, only=EVALUATES)
    """Evaluate only the first N questions of each task."""
    eval_subsample: int | None = flag(least=1, only=EVALUATES)
    """Evaluate only N questions of each of --eval-tasks, shared out among its subjects, the same ones every time."""
    split_by: str | None = flag(only=EVALUATES)
    """Also report accuracy apart for each value of this column of the questions."""
    export: bool = True
    """Write model/, and with LoRA adapter/, after the last step."""
    log_every: int = flag(1, least=1)
    """Optimizer steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_tasks", tuple(split_names(self.eval_tasks)))
        check_once("--eval-tasks", self.eval_tasks)
        if self.limit is not None and self.eval_subsample is not None:
            raise UserError("--limit has no effect beside --eval-subsample: give one of them")
        self.check_text()
        self.check_resume()
        settle(self)
        self.check_filter()
        self.check_latent()
        self.check_adversary()
        self.check_budgets()
        self.check_track()
        if self.output is None:
            kind = f"lora{self.lora_rank}" if self.lora_rank > 0 else "full"
            named = "" if self.method == "lens" else f"{self.method}-"
            name = f"runs/{self.model.rstrip('/').rpartition('/')[2]}-{named}{kind}-{self.optimizer}"
            object.__setattr__(self, "output", name)
        self.check_method()

    @property
    def unread(self) -> dict[str, str]:
        """See `CorpusFlags`: forget text without a forget loss, retain text without a retain loss. A method for which
        this is not so has an `unread` of its own."""
        forget = {} if getattr(self, "remove_coef", 1.0) != 0.0 else {"forget": FORGETS.says(self)}
        missing = next((one for one in (HAS_RETAIN, RETAINS) if not one.holds(self)), None)
        return forget if missing is None else forget | {"retain": missing.says(self)}

    def check_method(self) -> None:
        """What a method has to say about its flags beyond their ranges; see its `Flags`."""

    @property
    def uses_adam(self) -> bool:
        """Whether AdamW gets any parameter: under Muon, LoRA leaves it none."""
        return self.optimizer == "adamw" or (self.optimizer == "muon" and self.lora_rank == 0)

    def shard_kind(self, world_size: int) -> Literal["full", "hybrid", "replicate"]:
        """How the model is laid out over `world_size` ranks."""
        return self.shard or ("full" if self.lora_rank == 0 and world_size > 1 else "replicate")

    def check_depth(self, depth: int) -> None:
        """Raise unless every target layer of the method exists in a model of `depth` blocks."""
        check_layers(getattr(self, "layers", ()), depth, depth)

    def check_blocks(self, depth: int) -> None:
        """Raise unless every block that is adapted or attacked exists in a model of `depth` blocks."""
        check_layers(self.lora_layers, depth - 1, depth, "--lora-layers")
        check_layers(self.latent_layers, depth - 1, depth, "--latent-layers")


def check_layers(layers: Sequence[int], highest: int, depth: int, flag: str = "--layers") -> None:
    """Raise unless all of `layers` are in 0..highest, in a model of `depth` blocks."""
    for layer in layers:
        if not 0 <= layer <= highest:
            raise UserError(
                f"expected {flag} in 0..{highest} (the model has {depth} blocks); found {layer}: choose others"
            )


@dataclass(frozen=True, kw_only=True)
class LayerFlags:
    """Where a method reads the residual stream."""

    layers: tuple[int, ...] = ()
    """Target layers l, in 0..L: the residual stream that enters block l; L is the final one."""

    def check_method(self) -> None:
        """Raise unless there are layers, each once."""
        if not len(set(self.layers)) == len(self.layers) > 0:
            raise UserError(f"expected --layers to be one or more different layers; found {self.layers}")


@dataclass(frozen=True, kw_only=True)
class RetainFlags:
    """How a method holds the model to its original on retain text."""

    retain_loss: Literal["kl", "l2", "mse", "next-token"] | None = flag(only=RETAINS)
    """kl: KL(original || model) a token, in nats; l2: distance of the residual streams at the target layers; mse: mean
    square of their difference; next-token: cross-entropy of retain text itself, in nats."""
    retain_coef: float | None = flag(least=0.0)
    """Weight of the retain loss at the end of the run."""
    retain_start: float = flag(0.0, least=0.0, most=1.0, only=(RETAINS, SCHEDULED))
    """Share of --retain-coef at the first step, from which it rises linearly."""
    retain_budget: float | None = flag(above=0.0, only=RETAINS)
    """Largest retain loss, kept by dual ascent: --retain-coef is then what its weight begins with; after each step the
    weight grows by --retain-rate times what the loss is above the budget, or falls, to 0 at the least."""
    retain_rate: float | None = flag(published=1.0, above=0.0, only=(RETAINS, BUDGETED))
    """How fast the weight follows. Published: 1 (https://arxiv.org/abs/2506.05314)."""


@dataclass(frozen=True, kw_only=True)
class OutputRetainFlags(RetainFlags):
    """How a method that pushes on predictions holds the model: by them too. With the settings that such methods share
    (open-unlearning's, https://github.com/locuslab/open-unlearning)."""

    retain_loss: Literal["kl", "next-token"] | None = flag(published="next-token", only=RETAINS)
    """next-token: cross-entropy of retain text itself, in nats (published); kl: KL(original || model) a token."""
    retain_coef: float | None = flag(1.0, least=0.0)
    """Weight of the retain loss. Published: 1."""
    retain_start: float = flag(1.0, least=0.0, most=1.0, only=(RETAINS, SCHEDULED))
    """Share of --retain-coef at the first step, from which it rises linearly. Published: 1."""
    adam_lr: float | None = flag(1e-5, above=0.0)
    """Peak learning rate of AdamW. Published: 1e-5."""


@cache
def config_of(method: str, base: type[TrainConfig] = TrainConfig) -> type[TrainConfig]:
    """The flags of `base` together with those of a method, which come last and may give shared flags other defaults."""
    flags = flags_of(method)
    named = [("method", Literal[METHODS], flag(method))]
    merged = make_dataclass(base.__name__, named, bases=(flags, base), frozen=True, kw_only=True)
    merged.__doc__, merged.__module__ = flags.__doc__, base.__module__
    return merged


def configure(method: str = "lens", **flags: Any) -> TrainConfig:
    """The configuration of a run by keyword; see `config_of`."""
    return config_of(method)(**flags)


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
    """Read a flags dataclass from the command line, and from the file of its --config if it has that flag; a mistake is
    shown by rank 0 only and exits with code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return parse_words(flags, with_file(words, lambda _: flags) if hasattr(flags, "config") else words)


def parse_words(flags: type[Flags], words: Sequence[str]) -> Flags:
    """The same for words that have those of a file already."""
    return tyro.cli(flags, prog=program_name(), args=words, console_outputs=os.environ.get("RANK", "0") == "0")


def parse_method_flags(base: type[TrainConfig], arguments: Sequence[str] | None = None) -> TrainConfig:
    """Read the flags of `base` and of the method that --method, or --config, names; see `parse_flags`."""
    typed = sys.argv[1:] if arguments is None else arguments
    words = with_file(typed, lambda words: config_of(named_method(words), base))  # type: ignore[arg-type]
    return parse_words(config_of(named_method(words), base), words)  # type: ignore[arg-type]


def named_method(words: Sequence[str], otherwise: str = "lens") -> str:
    """The method that a command line names; `otherwise` where it names none, or a wrong one: the parser refuses it."""
    given = [word.partition("=")[2] for word in words if word.startswith("--method=")]
    given += [after for word, after in itertools.pairwise(words) if word == "--method"]
    return given[-1] if given and given[-1] in METHODS else otherwise
