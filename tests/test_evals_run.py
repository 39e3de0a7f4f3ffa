"""`evals/run.py` as a user types it, and what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evals_support import OracleModel, make_model, make_tokenizer, question, write_wmdp

from unlearn.errors import UserError
from unlearn.evals import run
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.output import write_result
from unlearn.model import save_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint in `model` and ten questions in `data`."""
    folder = tmp_path_factory.mktemp("evals")
    (folder / "model").mkdir()
    save_model(make_model("neox"), make_tokenizer(), folder / "model")
    write_wmdp(folder / "data", [question(i, i % 4, None) for i in range(10)])
    return folder


def command(place: Path, *flags: str) -> list[str]:
    base = ["--model", str(place / "model"), "--tasks", "wmdp_bio", "--data-dir", str(place / "data")]
    return [*base, "--dtype", "fp32", *flags]


def test_torchrun_from_elsewhere_writes_what_one_process_finds(place: Path, tmp_path: Path) -> None:
    """A script run by its path has its own folder first on sys.path: none of our modules may hide another."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "evals/run.py"), *command(place, "--out", str(tmp_path / "out"))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|wmdp_bio|") == 1
    (file,) = (tmp_path / "out").glob("*/results_*.json")
    written = json.loads(file.read_text())
    alone = Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=place / "data").run(make_model("neox"))
    assert written["results"]["wmdp_bio"]["acc,none"] == alone["results"]["wmdp_bio"]["acc,none"]
    assert written["unlearn"]["world_size"] == 2 and written["unlearn"]["dtypes"]["weights"] == ["float32"]


def test_help_and_wrong_flags_do_not_wait_for_torch() -> None:
    heavy = ("torch", "lm_eval", "datasets", "numpy", "matplotlib")
    for module in ("run", "pair", "fetch"):
        code = f"import sys, unlearn.evals.{module}; sys.exit(any(name in sys.modules for name in {heavy}))"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_own_modules_hide_no_others() -> None:
    """`python evals/run.py` makes each file of evals/ importable by its bare name."""
    names = {path.stem for path in (ROOT / "evals").glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | {"datasets", "evaluate", "utils", "tasks", "config"})


def test_layout_is_lm_evals(tmp_path: Path) -> None:
    write_wmdp(tmp_path / "data", [question(i, i % 4, 0) for i in range(4)])
    tokenizer = make_tokenizer()
    evaluation = Evaluation(tokenizer, tasks=["wmdp_bio"], data_dir=tmp_path / "data")
    result = evaluation.run(OracleModel(tokenizer), name="owner/name")
    file = evaluation.write(result, tmp_path / "out", samples=True)
    assert file is not None
    stamp = file.stem.removeprefix("results_")
    assert file.parent == tmp_path / "out" / "owner__name"
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"samples_wmdp_bio_{stamp}.jsonl"}
    written = json.loads(file.read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config", "date"} <= set(
        written
    )
    assert written["results"]["wmdp_bio"]["acc,none"] == 0.25 and "acc_stderr,none" in written["results"]["wmdp_bio"]
    assert written["model_name"] == "owner/name" and written["n-shot"] == {"wmdp_bio": 0}
    assert {"data", "dtypes", "tie_rate", "truncated_rows", "world_size"} <= set(written["unlearn"])
    lines = [json.loads(line) for line in (file.parent / f"samples_wmdp_bio_{stamp}.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[1]["target"] == "1" and lines[1]["acc"] == 0.0
    assert lines[0]["arguments"]["gen_args_3"]["arg_1"] == " D"
    assert lines[0]["filtered_resps"][0] == [str(result["samples"]["wmdp_bio"][0]["filtered_resps"][0][0]), "True"]


def test_results_are_replaced_only_when_told(place: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=place / "data")
    old = evaluation.run(make_model("neox"), name="m")
    first = evaluation.write(old, tmp_path)
    new = evaluation.run(make_model("neox", seed=1), name="m")
    with pytest.raises(UserError, match="expected no results in .*--overwrite"):
        evaluation.write(new, tmp_path)
    assert first is not None and first.exists()
    second = evaluation.write(new, tmp_path, overwrite=True)
    assert second is not None and second.exists() and not first.exists() and list(second.parent.iterdir()) == [second]


def test_failed_write_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(make_tokenizer(), tasks=["wmdp_bio"], data_dir=place / "data")
    result = evaluation.run(make_model("neox"), name="m")
    result["samples"]["wmdp_bio"][5]["doc"] = {(1, 2): "no JSON has such a key"}
    with pytest.raises(TypeError):
        write_result(result, tmp_path, samples=True)
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", "{place}/model"], "found no such file"),
        (["--limit", "0"], "--limit above 0"),
        (["--batch-tokens", "-1"], "--batch-tokens above 0"),
        (["--model", "{place}/nothing"], "found nothing at"),
        (["--out", "{place}/data/cais/wmdp/wmdp-bio/test-00000-of-00001.parquet"], "expected to write"),
        (["--overwrite"], "no effect without --out"),
        (["--samples"], "no effect without --out"),
        (["--margin", "0.02"], "no effect without --baseline"),
        (["--limit", "3", "--subsample", "3"], "no effect beside --subsample"),
        (["--target", "wmdp_bio"], "--target as TASK<=SHARE"),
        (["--baseline", "{place}/data"], "an interrupted run leaves none"),
        (["--tasks", "wmdp_boi"], "did you mean wmdp_bio"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    place: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = command(place, *[flag.replace("{place}", str(place)) for flag in flags])
    assert run_here(run.main, *arguments) == 2
    printed = capsys.readouterr()
    text = " ".join((printed.err + printed.out).replace("│", " ").split())
    assert message in text and "Traceback" not in text


def test_existing_results_are_found_before_the_model_is_loaded(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(place, "--out", str(tmp_path / "out"), "--limit", "2")
    assert run_here(run.main, *arguments) == 0
    assert "Results in" in capsys.readouterr().out
    monkeypatch.setattr("unlearn.model.load_model", None)
    assert run_here(run.main, *arguments) == 2
    assert "expected no results in" in capsys.readouterr().err


def written(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_verdict_and_comparison_are_printed_and_written(
    place: Path, tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(run.main, *command(place, "--out", str(tmp_path / "base"))) == 0
    assert not list((tmp_path / "base").rglob("samples_*")), "samples on request only"
    flags = ["--out", str(tmp_path / "new"), "--baseline", str(tmp_path / "base"), "--samples", "--margin", "0.02"]
    targets = ["--target", "wmdp_bio<=0.95", "--target", "wmdp_bio>=0.01"]
    capsys.readouterr()
    assert run_here(run.main, *command(place, *flags, *targets)) == 0
    printed = capsys.readouterr().out
    own = written(tmp_path / "new")["unlearn"]
    assert len(own["verdict"]["targets"]) == 2 and own["verdict"]["words"] in printed
    compared = own["baseline"]["tasks"]["wmdp_bio"]
    assert compared["difference"] == 0.0 and compared["p"] == 1.0 and compared["margin"] == 0.02
    assert "question by question" in printed and "debiased" in printed
    assert len(list((tmp_path / "new").rglob("samples_wmdp_bio_*.jsonl"))) == 1
    (file,) = own["data"]["wmdp_bio"]
    assert file.endswith(".parquet") and len(own["data"]["wmdp_bio"][file]) == 64


def test_model_that_always_says_c_is_called_collapsed(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: a checkpoint whose unembedding favours one letter, through the command."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    model.config.tie_word_embeddings = False
    (letter,) = tokenizer.encode(" C")
    model.model.norm.weight.data.zero_()  # the final norm gives zeros: every logit is 0 ...
    head = model.lm_head.weight.data
    model.lm_head.weight.data = head.zero_()
    head[letter] = 1.0
    model.model.norm.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data.abs_()
    for layer in model.model.layers:  # ... but for C's, the sum of a stream that stays positive
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    (tmp_path / "model").mkdir()
    save_model(model, tokenizer, tmp_path / "model")
    write_wmdp(tmp_path / "data", [question(i, i % 4, None) for i in range(80)])
    arguments = ["--model", str(tmp_path / "model"), "--tasks", "wmdp_bio", "--data-dir", str(tmp_path / "data")]
    assert run_here(run.main, *arguments, "--dtype", "fp32", "--target", "wmdp_bio<=0.25") == 0
    printed = capsys.readouterr().out
    assert "verdict: met only by collapse by point estimate; met only by collapse by 95 % interval" in printed
    assert "100% of all answers are C" in printed


def test_changed_questions_are_found_before_the_model_is_loaded(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here(run.main, *command(place, "--out", str(tmp_path / "base"))) == 0
    write_wmdp(tmp_path / "data", [question(i, (i + (i == 4)) % 4, None) for i in range(10)])
    monkeypatch.setattr("unlearn.model.load_model", None)
    capsys.readouterr()
    baseline = ["--baseline", str(tmp_path / "base")]
    for flags, message in [
        (["--data-dir", str(tmp_path / "data")], "found 1 of 10 changed"),
        (["--limit", "5"], "found 5 here and 10 there"),
        (["--permute-choices"], "found 40 here and 10 there"),
        (["--target", "mmlu>=0.3"], "found 'mmlu': add it to --tasks"),
    ]:
        assert run_here(run.main, *command(place, *flags, *baseline)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1 and "Traceback" not in error


def test_interrupted_run_says_so_and_leaves_no_results(place: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    write_wmdp(tmp_path / "data", [question(i, i % 4, None) for i in range(40_000)])
    flags = command(place, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--batch-tokens", "99")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "evals/run.py"), *flags],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    time.sleep(2.0)
    while process.poll() is None and not (tmp_path / "out").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "evals/run.py: interrupted" in error and "Traceback" not in error
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
