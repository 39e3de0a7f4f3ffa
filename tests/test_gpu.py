"""The same numbers on a GPU as on the CPU. Skipped without CUDA."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import hide_gpus
from test_losses import language_model
from test_methods import config, gradients_of

from unlearn.assemble import build
from unlearn.losses import logits_of
from unlearn.seeding import dropped, keep_mask
from unlearn.weights import local_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("token_cache", "gpus"),
]
MODES = {
    "lora": {"lora_rank": 3, "lora_dropout": 0.2},
    "full": {"optimizer": "muon"},
    "sampled": {"forget_loss": "sampled"},
    "sharded": {"shard": "full"},
}


@pytest.fixture
def gpus(hidden_gpus: pytest.MonkeyPatch) -> Iterator[None]:
    hidden_gpus.undo()
    yield
    hide_gpus(hidden_gpus)


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_equal_the_cpus(home: Path, mode: str) -> None:
    """Dropout masks and sampled targets included: they are hashes, not a device's random numbers."""
    runs = [build(config(home, **MODES[mode]), torch.device(device)) for device in ("cpu", "cuda")]
    for run in runs:
        run.model.train()
    expected, metrics = (gradients_of(run, 1) for run in runs)
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key].cpu(), value, rtol=1e-4, atol=1e-5)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            on_gpu, on_cpu = local_rows(other.grad)[0].cpu(), local_rows(one.grad)[0]
            torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_steps_stay_finite(home: Path, mode: str) -> None:
    run = build(config(home, dtype="bf16", **MODES[mode]), torch.device("cuda"))
    run.model.train()
    for step in range(run.steps):
        assert all(torch.isfinite(torch.as_tensor(value)) for value in gradients_of(run, step).values())
        for optimizer in run.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "positions", "features"), [(2, 7, 1500), (3, 5, 1), (1, 1, 1024)])
def test_the_dropout_kernel_has_the_masks_bits(dtype: torch.dtype, rows: int, positions: int, features: int) -> None:
    keys = torch.randint(0, 2**31 - 1, (rows,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows, positions, features, dtype=dtype, device="cuda", requires_grad=True)
    found, mask = dropped(x, keys.cuda(), 0.3), keep_mask(keys, positions, features, 0.3).cuda()
    assert torch.equal(found, x * mask)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream * mask)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_bf16_are_float32(autocast: bool) -> None:
    """The product is summed in float32 there anyway, and must not be rounded on its way out."""
    hidden, _, matrix = (tensor.cuda() for tensor in language_model(0.0))
    exact = (hidden.double() @ matrix.double().T).float()
    if autocast:
        hidden, matrix = hidden.float(), matrix.float()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(logits_of(hidden, matrix), exact, rtol=1e-5, atol=1e-4)
