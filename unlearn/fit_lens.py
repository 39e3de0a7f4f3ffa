"""Train a tuned lens: per layer, minimise KL(model's final distribution || lens's) on forget and retain text.

Belrose et al. 2023, https://arxiv.org/abs/2303.08112. Only the translators are trained; norm and unembedding are the
model's. A tenth of the windows is held out: KL and top-1 agreement on it are reported beside the plain logit lens.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from unlearn.batches import Batches, Rows, check_examples
from unlearn.config import check_layers
from unlearn.corpus import Corpus, read_corpus
from unlearn.distributed import all_sum, fail_together, is_main, process_group
from unlearn.errors import UserError
from unlearn.files import atomic_folder, files_hash, write_json, writing
from unlearn.fit_config import FitLensConfig
from unlearn.lens import TunedLens
from unlearn.losses import CHUNK, divergence, logits_of
from unlearn.methods.terms import Cost, Loss, Numbers, Term, add
from unlearn.model import load_config, load_model, load_tokenizer, residual_streams
from unlearn.model_config import check_windows
from unlearn.optim.build import BETAS, EPS, linear_schedule
from unlearn.precision import DTYPES
from unlearn.run.folder import FITTING, LENS, MARKER, check_output
from unlearn.run.log import MetricsLog
from unlearn.run.preflight import check_apart, settings_hashes
from unlearn.run.run import Run, at_work, opened_run
from unlearn.trainer import train
from unlearn.weights import Checkpoint


@dataclass(frozen=True)
class EveryLayer:
    """Sum over layers of KL(final || lens) over a micro-batch's tokens, in nats; differentiated a layer at a time.

    The reference logits of a chunk of tokens are computed once for all layers.

    Attributes:
        streams: {l: h[l] [N, D]}. final: the model's final normalised hidden states [N, D].
        weights: what a token counts, float32 [N].
    """

    lens: TunedLens
    streams: Mapping[int, Tensor]
    final: Tensor
    weights: Tensor

    def backward(self, weight: float) -> tuple[Tensor, Numbers]:
        """See `unlearn.methods.terms.Cost`."""
        shares: Numbers = {}
        with summed_apart(self.lens.translators.parameters()):
            for part in chunks(self.final):
                for layer, loss in self._losses(part):
                    (weight * loss).backward()
                    add(shares, {f"kl/{layer}": loss.detach()})
        return torch.stack(list(shares.values())).sum(), shares

    def _losses(self, part: slice) -> Iterator[tuple[int, Tensor]]:
        """(l, its weighted sum []) of the tokens `part`, one by one."""
        lens, weights = self.lens, self.weights[part]
        reference = logits_of(self.final[part], lens.unembedding, lens.softcap)
        for layer, stream in self.streams.items():
            hidden = lens.hidden(stream[part], layer)
            yield layer, divergence(hidden, lens.unembedding, lambda _: reference, weights, softcap=lens.softcap)[0]


@contextmanager
def summed_apart(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sum the gradients of a block's backward passes before those that were there are added to them: a micro-batch's
    are then one number each, and their sum the same on one rank that has two and on two that have one."""
    trained = list(parameters)
    earlier = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    yield
    for parameter, before in zip(trained, earlier, strict=True):
        if before is not None:
            parameter.grad = before if parameter.grad is None else parameter.grad.add_(before)


def chunks(tokens: Tensor) -> list[slice]:
    """Parts of N tokens, whose logits may exist at once."""
    return [slice(start, start + CHUNK) for start in range(0, len(tokens), CHUNK)]


def terms(model: PreTrainedModel, lens: TunedLens, batches: Batches) -> list[Term]:
    """One term: the sum over layers of the mean over tokens of KL(final || lens), in nats."""

    def cost(rows: Rows) -> Cost:
        streams, final = read_streams(model, lens, rows)
        return EveryLayer(lens, streams, final, rows.weights())

    return [Term("kl", batches, cost)]


@torch.no_grad()
def read_streams(model: PreTrainedModel, lens: TunedLens, rows: Rows) -> tuple[dict[int, Tensor], Tensor]:
    """The streams h[l] of the real tokens that the lens reads, {l: [N, D]}, and the model's final normalised hidden
    state [N, D]."""
    streams = residual_streams(model, rows.input_ids, [*lens.layers, lens.depth])
    kept = {layer: rows.at_real(stream) for layer, stream in streams.items()}
    return kept, lens.hidden(kept.pop(lens.depth), lens.depth)


@torch.no_grad()
def measure(model: PreTrainedModel, lens: TunedLens, batches: Batches) -> list[dict[str, float]]:
    """Mean KL (nats) and top-1 agreement with the model's final distribution, of each of the lens's layers, over all
    `batches`."""
    device = lens.unembedding.device
    sums = torch.zeros(len(lens.layers), 3, dtype=torch.float64, device=device)
    for step in range(batches.steps):
        for rows in batches.micro_batches(step, device):
            streams, final = read_streams(model, lens, rows)
            for part in chunks(final):
                expected = logits_of(final[part], lens.unembedding, lens.softcap).log_softmax(dim=-1)
                for index, layer in enumerate(lens.layers):
                    read = lens.logits(streams[layer][part], layer).log_softmax(dim=-1)
                    apart = (expected.exp() * (expected - read)).sum(dim=-1).double().sum()
                    agreed = (read.argmax(dim=-1) == expected.argmax(dim=-1)).sum()
                    sums[index] += torch.stack([apart, agreed.double(), apart.new_tensor(len(expected))])
    return [{"kl": kl / n, "top1": agreed / n} for kl, agreed, n in all_sum(sums).tolist()]


def fit_lens(config: FitLensConfig) -> None:
    """Train a lens as the flags say, report it, and write it.

    Raises:
        UserError: see `check_output`, `read_corpus` and `load_model`.
    """
    inputs = (config.model, config.forget, config.retain)
    with process_group(config.device) as device:
        output = Path(config.output).expanduser()
        known = (output / "fitting/config.json").exists() or not (output / "config.json").exists()
        output = check_output(config.output, config.overwrite, LENS, inputs, resumes=config.resumes and known)
        place = str(output / "fitting")
        with at_work(output), opened_run(config, place, FITTING, inputs, device, marker=output / MARKER) as run:
            corpora, identity = _read(config)
            finished = run.finished(identity)
            if not finished:
                _fit(config, corpora, identity, output, run)
            if is_main():
                print(f"{'finished before: ' if finished else ''}tuned lens: {output}")


def _read(config: FitLensConfig) -> tuple[list[Corpus], dict[str, str]]:
    """The corpora, and digests of what is read."""
    model_config = load_config(config.model, revision=config.revision)
    depth = int(model_config.num_hidden_layers)
    check_layers(config.layers, depth - 1, depth)
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    corpora = {
        which: read_corpus(
            name,
            tokenizer,
            seq_len=config.seq_len,
            column=column,
            template=template,
            column_flag=f"--{which}-column",
        )
        for which, name, column, template in (
            ("forget", config.forget, config.forget_column, config.forget_template),
            ("retain", config.retain, config.retain_column, config.retain_template),
        )
    }
    check_windows(model_config, {corpus.name: corpus.windows for corpus in corpora.values()})
    check_apart(corpora)
    identity = {f"{which} corpus": corpus.sha256() for which, corpus in corpora.items()}
    checkpoint = Checkpoint.open(config.model, revision=config.revision)
    identity |= {"model": files_hash(checkpoint.paths())} | settings_hashes(checkpoint.folder)
    return list(corpora.values()), identity


def _fit(config: FitLensConfig, corpora: list[Corpus], identity: Mapping[str, str], output: Path, run: Run) -> None:
    training, held_out = _split(config, corpora)
    model = load_model(config.model, revision=config.revision, dtype=DTYPES[config.dtype], device=run.device)
    model.requires_grad_(False)
    layers = sorted(config.layers) or range(int(model.config.num_hidden_layers))
    lens = TunedLens.identity(model, layers).for_training()
    optimizer = torch.optim.AdamW(lens.translators.parameters(), lr=config.lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    run.begin(identity, {"adamw": optimizer}, 0)
    logit_lens = TunedLens.identity(model, layers)  # in the dtype in which the tuned one is measured
    plain = measure(model, logit_lens, held_out)
    _train(config, model, lens, training, {"adamw": optimizer}, run)
    lens.to(DTYPES[config.dtype])
    _close(config, output, lens, plain, measure(model, lens, held_out))
    run.finish()


def _split(config: FitLensConfig, corpora: list[Corpus]) -> tuple[Batches, Batches]:
    """Training and held-out batches over both corpora together.

    Every tenth window is held out, at most 256: windows, not documents, so that for long documents the held-out text
    has neighbours in training.
    """
    windows = [window for corpus in corpora for window in corpus.windows]
    name, documents = " and ".join(corpus.name for corpus in corpora), sum(corpus.documents for corpus in corpora)
    if len(windows) < 2:
        raise UserError(f"expected two windows or more in {name}; found {len(windows)}: use larger corpora")
    check_examples(Corpus(name, documents, windows), len(windows), config.batch)
    count = max(1, min(256, len(windows) // 10))
    stride = len(windows) // count
    held = windows[::stride][:count]
    taken = set(range(0, len(windows), stride)[:count])
    kept = [window for index, window in enumerate(windows) if index not in taken]
    total = config.steps * config.batch
    shared = {"batch": config.batch, "seed": config.seed, "micro_batch": config.micro_batch}
    return (
        Batches(Corpus(name, documents, kept), examples=len(kept), total=total, tag="lens", **shared),
        Batches(Corpus(name, documents, held), examples=count, total=count, tag="held-out", **shared),
    )


def _train(
    config: FitLensConfig,
    model: PreTrainedModel,
    lens: TunedLens,
    batches: Batches,
    optimizers: dict[str, Optimizer],
    run: Run,
) -> None:
    with MetricsLog(None, config.steps, "fitting the lens") as log:
        checkpoints = run.checkpoints(lens.translators, optimizers, log, config.steps)
        train(
            lens.translators,
            Loss(terms(model, lens, batches)),
            optimizers,
            steps=config.steps,
            schedule=linear_schedule(config.steps, warmup_ratio=0.05),
            log=log,
            clip=1.0,
            first=checkpoints.resume().step,
            checkpoints=checkpoints,
            timeout=timedelta(seconds=config.step_timeout),
        )
    lens.requires_grad_(False)


def _close(
    config: FitLensConfig, output: Path, lens: TunedLens, plain: list[dict[str, float]], tuned: list[dict[str, float]]
) -> None:
    """Print the table and write the lens with its report, fit.json."""
    report: dict[str, Any] = {"config": dataclasses.asdict(config), "layers": lens.layers}
    report |= {"logit_lens": plain, "tuned_lens": tuned}
    with fail_together():
        if not is_main():
            return
        print("held out   KL (nats)            top-1 agreement\nlayer      logit lens    tuned  logit lens    tuned")
        for layer, before, after in zip(lens.layers, plain, tuned, strict=True):
            print(f"{layer:5d} {before['kl']:15.3f} {after['kl']:8.3f} {before['top1']:11.3f} {after['top1']:8.3f}")
        whole = output / "fitting/lens"
        with atomic_folder(whole, replace=True) as temporary:
            lens.save(temporary)
            write_json(temporary / "fit.json", report)
        with writing(output):  # a folder without config.json is no lens: it goes first and comes last
            (output / "config.json").unlink(missing_ok=True)
            for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, output / file.name)
            whole.rmdir()
