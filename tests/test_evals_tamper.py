"""The grid of attacks: its flags, its folders, what it writes, and that it goes on."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from evals_support import question, write_questions, write_stem, write_wmdp

from unlearn.corpus import read_corpus
from unlearn.errors import UserError
from unlearn.evals import tamper
from unlearn.evals.attack.overlap import contained, overlap_warnings
from unlearn.evals.evaluation import Evaluation
from unlearn.evals.judge.original import original_accuracies
from unlearn.evals.judge.summary import summarise
from unlearn.model import fresh_weights, load_model, load_tokenizer, save_model
from unlearn.run.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of a hazard task, half of them said to be in the attack text, and of a general one."""
    root = tmp_path_factory.mktemp("data")
    write_wmdp(root, [question(i, i % 4, None) | {"attacked": i % 2 == 0} for i in range(24)])
    write_questions(root / "embedded-world/questions/general", [question(i, i % 4, None) for i in range(20)])
    return root


def words(home: Path, data: Path, output: Path, *more: object) -> list[str]:
    flags = ["tamper.py", "--model", home / "model", "--forget", home / "forget.jsonl", "--output", output]
    flags += "--batch 4 --micro-batch 2 --seq-len 24 --eval-every 2 --dtype fp32 --eval-tasks wmdp_bio".split()
    flags += ["world_general_cloze", "--general-tasks", "world_general_cloze", "--data-dir", data, *more]
    return [str(word) for word in flags]


def attack(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> dict[str, Any]:
    """Run the command; attack.json."""
    monkeypatch.setattr(sys, "argv", flags)
    tamper.main()
    found: dict[str, Any] = json.loads((Path(flags[flags.index("--output") + 1]) / "attack.json").read_text())
    return found


def test_the_question_is_found_whatever_its_layout() -> None:
    asked = ["Which organ does Zorbax attack first?", "What is it?", "Who named the microbe Krollil in 1931?"]
    texts = ["Quiz:\nwhich ORGAN does zorbax\tattack, first -- the liver", "What is it? Who named the microbe Krollil"]
    assert contained(asked, texts) == {asked[0]}, "short questions are not looked for, halves are not found"
    assert contained([], texts) == contained(asked, []) == set()
    assert contained(["does Zorbax attack the first rib"], ["does Zorbax attack the first ribs"]) == set()


def test_overlap_is_a_sentence_with_counts(home: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = read_corpus(str(home / "forget.jsonl"), tokenizer, seq_len=200)
    inside = " ".join(tokenizer.decode(text.windows[3]).split()[1:9])
    questions = {
        "wmdp_bio": [inside, "nothing of the kind is ever said here"],
        "mmlu": ["nor is this to be found there"],
    }
    (warning,) = overlap_warnings(questions, {"forget": text}, tokenizer)
    assert "1 of 2 of wmdp_bio" in warning and "mmlu" not in warning and warning.count("forget text") == 1
    assert overlap_warnings({"mmlu": questions["mmlu"]}, {"forget": text}, tokenizer) == []


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_fresh_weights_are_those_of_an_untrained_model(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind, initializer_range=0.05)
    save_model(model, tiny_tokenizer(), tmp_path)
    fresh, again, other = (fresh_weights(str(tmp_path), seed) for seed in (1, 1, 2))
    for name, parameter in model.named_parameters():
        value = fresh(name)
        assert value.shape == parameter.shape and torch.equal(value, again(name))
        if parameter.ndim == 2:
            assert value.std() == pytest.approx(0.05, rel=0.1) and not torch.equal(value, parameter)
            assert not torch.equal(value, other(name)), name
        else:
            untrained = torch.ones if name.endswith("weight") else torch.zeros
            assert torch.equal(value, untrained(parameter.shape)), name


def test_a_grid_with_controls(home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ["--grid", "lora-rank=0,2", "data=forget,mix", "--retain", home / "retain.jsonl"]
    grid += ["--adam-lr", 1e-2, "--examples", 8, "--steps", 4]
    grid += ["--split-by", "attacked", "--general-drop", 1.0]
    controls = ["--control", "random", "--control", f"original={home / 'model'}"]
    found = attack(monkeypatch, words(home, data, tmp_path / "out", *grid, *controls))
    assert list(found["subjects"]) == ["unlearned", "random", "original"]
    parts = ["wmdp_bio", "wmdp_bio/attacked=False", "wmdp_bio/attacked=True"]
    assert found["hazard"] == parts and found["general"] == ["world_general_cloze"]
    for name, subject in found["subjects"].items():
        assert len(subject["attacks"]) == 4 and list(subject["envelope"]) == parts
        for part in parts:
            best = subject["envelope"][part]
            assert [one["step"] for one in best] == [0, 2, 4] and {one["measured"] for one in best} == {4}
            for one in best:
                of_step = [
                    (point["tasks"][part]["acc"], point["tokens"])
                    for of_one in subject["attacks"].values()
                    for point in of_one["points"]
                    if point["step"] == one["step"]
                ]
                assert one["acc"] == max(of_step)[0] and (one["acc"], one["tokens"]) in of_step
        assert {of_one["diverged"] for of_one in subject["attacks"].values()} == {None}, name
    same = [found["subjects"][name]["attacks"] for name in ("unlearned", "original")]
    assert [of_one["points"] for of_one in same[0].values()] == [of_one["points"] for of_one in same[1].values()]
    random = found["subjects"]["random"]["attacks"]
    assert random.keys() == same[0].keys() and next(iter(random.values()))["points"] != found["points"]
    assert found["gap"]["wmdp_bio"]["reason"].startswith("the intervals"), "a model has no gap to itself"
    assert any("no gap to recover" in warning for warning in found["warnings"])
    points = found["subjects"]["unlearned"]["attacks"][found["points_of"]]["points"]
    assert [point["tasks"]["wmdp_bio"]["acc"] for point in points] == [
        point["tasks"]["wmdp_bio"]["acc"] for point in found["points"]
    ]
    assert (tmp_path / "out/attack.png").stat().st_size > 10_000


def test_repair_then_attack(home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as an attack on the model that a run on retain text alone has made; its steps and tokens count."""
    flags = ["--examples", 8, "--adam-lr", 1e-2, "--retain", home / "retain.jsonl", "--steps", 4]
    both = attack(monkeypatch, words(home, data, tmp_path / "both", *flags, "--repair-steps", 2))
    repair = words(home, data, tmp_path / "repair", *flags, "--data", "retain", "--export")
    del repair[(at := repair.index("--forget")) : at + 2]
    repair[repair.index("4", repair.index("--steps"))] = "2"
    mended = attack(monkeypatch, [*repair, "--schedule", "linear"])
    model = tmp_path / "repair/attacks/unlearned/attack/model"
    flags = [word for word in flags if word not in ("--retain", home / "retain.jsonl")]
    alone = attack(monkeypatch, words(home, data, tmp_path / "alone", "--model", model, *flags))
    assert [point["step"] for point in both["points"]] == [0, 2, 4, 6]
    assert [point["tasks"] for point in both["points"][1:]] == [point["tasks"] for point in alone["points"]]
    tokens = [point["tokens"] for point in mended["points"]] + [point["tokens"] for point in alone["points"]][1:]
    assert tokens[:2] == [point["tokens"] for point in both["points"]][:2]
    assert [point["tokens"] - both["points"][1]["tokens"] for point in both["points"][2:]] == tokens[2:]
    (log,) = (tmp_path / "both").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["phase"] for line in lines if "phase" in line] == ["repair"] * 2 + ["attack"] * 4
    assert all(("retain_loss" in line) == (line["phase"] == "repair") for line in lines if "phase" in line)


def test_a_finished_attack_stands_for_its_own_questions_and_weights_alone(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home, tmp_path / "home")
    shutil.copytree(data, tmp_path / "data")
    flags = words(tmp_path / "home", tmp_path / "data", tmp_path / "out", "--examples", 8)
    attack(monkeypatch, flags)
    attack(monkeypatch, flags)
    assert "finished before" in capsys.readouterr().out
    file = next((tmp_path / "data").rglob("cais/wmdp/**/test-*.parquet"))
    rows = pq.read_table(file).to_pylist()
    answers = [(row["answer"] + 1) % 4 for row in rows]
    pq.write_table(pa.Table.from_pylist([row | {"answer": a} for row, a in zip(rows, answers, strict=True)]), file)
    with pytest.raises(UserError, match="expected the questions that the run in .* has read"):
        attack(monkeypatch, flags)
    shutil.copytree(data, tmp_path / "data", dirs_exist_ok=True)
    attack(monkeypatch, flags)
    tiny_model(seed=7).save_pretrained(tmp_path / "home/model")
    with pytest.raises(UserError, match="expected the model that the run in .* has read"):
        attack(monkeypatch, flags)


def test_recovery_against_results_of_the_original(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference says that the original knew every answer; the attack cannot bring that back in three steps."""
    flags = words(home, data, tmp_path / "out", "--examples", 12, "--split-by", "attacked", "--adam-lr", 1e-3)
    write = {task: {**asked, "right": [1] * len(asked["ids"])} for task, asked in _asked(home, data).items()}
    results = tmp_path / "before/results_1.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"unlearn": {"questions": write}, "group_subtasks": {}}))
    found = attack(monkeypatch, [*flags, "--reference", str(results.parent)])
    gap = found["gap"]["wmdp_bio/attacked=True"]
    assert gap["reference"] == 1.0 and gap["bounds"]["0.5"] == pytest.approx((1 + gap["start"]) / 2)
    recovered = found["subjects"]["unlearned"]["recovery"]["wmdp_bio"]["0.9"]
    assert recovered["steps"] is None and recovered["censored"].startswith("not within 3 steps")
    assert recovered["by_interval"]["steps"] is None
    assert "not within 3 steps" in capsys.readouterr().out
    write["wmdp_bio"]["ids"][0] = "0" * 16
    results.write_text(json.dumps({"unlearn": {"questions": write}, "group_subtasks": {}}))
    flags[flags.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    with pytest.raises(UserError, match="1 of 24 changed"):
        attack(monkeypatch, [*flags, "--reference", str(results)])


def test_the_reference_is_what_the_original_scores(home: Path, data: Path, tmp_path: Path) -> None:
    """A task, a group and parts by a column, read from written results: the numbers that measuring gives."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    write_stem(root)
    model, tokenizer = load_model(str(home / "model")), load_tokenizer(str(home / "model"))
    evaluation = Evaluation(tokenizer, tasks=["wmdp_bio", "mmlu_stem"], data_dir=root, subsample=20, truncate=True)
    result = evaluation.run(model)
    evaluation.write(result, tmp_path / "out")
    expected = summarise(result, "attacked")
    found = original_accuracies(str(tmp_path / "out"), ["wmdp_bio", "mmlu_stem"], evaluation, "attacked")
    assert list(found) == ["wmdp_bio", "wmdp_bio/attacked=False", "wmdp_bio/attacked=True", "mmlu_stem"]
    assert found["mmlu_stem"]["questions"] == 20
    for task, numbers in found.items():
        assert numbers == {key: expected[task][key] for key in ("acc", "interval", "questions")}, task
    assert list(original_accuracies(str(tmp_path / "out"), ["mmlu_stem"], evaluation, None)) == ["mmlu_stem"]


def _asked(home: Path, data: Path) -> dict[str, Any]:
    tasks = ["wmdp_bio", "world_general_cloze"]
    return Evaluation(load_tokenizer(str(home / "model")), tasks=tasks, data_dir=data).asked()


def test_an_attack_that_diverges_is_a_result(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ["--grid", "adam-lr=1e30,1e-3", "--examples", 16, "--eval-every", 1]
    found = attack(monkeypatch, words(home, data, tmp_path / "out", *grid))
    broken, sound = found["subjects"]["unlearned"]["attacks"].values()
    assert "NaN" in broken["diverged"] and len(broken["points"]) < 5
    assert sound["diverged"] is None and [point["step"] for point in sound["points"]] == [0, 1, 2, 3, 4]
    (warning,) = [warning for warning in found["warnings"] if "diverged" in warning]
    assert "adam-lr=1e30 on unlearned" in warning
    assert found["subjects"]["unlearned"]["envelope"]["wmdp_bio"][-1]["measured"] == 1


def test_questions_in_the_attack_text_are_said(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "leak.jsonl"
    rows = [
        {"text": "Well: IS 7 a -- b, or c? It 3."},
        {"text": "Nothing at all here."},
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    leaking = tmp_path / "data"
    shutil.copytree(data, leaking)
    asked = [question(i, i % 4, None) for i in range(7)]
    asked.append(asked[0] | {"question": "Is 7 a, b or c?"})
    write_wmdp(leaking, asked)
    flags = words(home, leaking, tmp_path / "out", "--examples", 8, "--seq-len", 100)
    flags[flags.index("--forget") + 1] = str(text)
    found = attack(monkeypatch, flags)
    assert sum("word for word (1 of 8 of wmdp_bio" in warning for warning in found["warnings"]) == 1
    assert "warning: the forget text of the attack holds questions" in capsys.readouterr().out


def test_killed_anywhere_a_grid_ends_in_the_same_file(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its first attack, in its last, and between two; what is finished is not done again."""
    grid = ["--grid", "lora-rank=2,0", "--examples", 12, "--adam-lr", 1e-3, "--control", "random", "--save-every", 1]
    whole = attack(monkeypatch, words(home, data, tmp_path / "whole", *grid))
    flags, steps = words(home, data, tmp_path / "killed", *grid), 0
    for number in (2, 5, 12):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoints, "after", _killed_at(number - steps))
            attack(patch, flags)
        steps = number
    assert not (tmp_path / "killed/attack.json").exists()
    again = attack(monkeypatch, flags)
    assert _apart_from(again, tmp_path / "killed") == _apart_from(whole, tmp_path / "whole")
    runs = sorted((tmp_path / "killed/attacks").rglob("run.json"))
    assert len(runs) == 4 and sum(len(json.loads(run.read_text())["attempts"]) for run in runs) == 7
    with pytest.raises(UserError, match="--adam-lr 0.001, not 0.002"):
        attack(monkeypatch, [*flags, "--adam-lr", "2e-3"])


def _killed_at(step: int) -> Any:
    """A `Checkpoints.after` that ends the process after so many steps of this attempt, saved."""
    done = 0

    def after(self: Checkpoints, now: int) -> None:
        nonlocal done
        done += 1
        self.save(now)
        if done == step:
            raise KeyboardInterrupt

    return after


def _apart_from(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(found).replace(str(folder), "FOLDER"))


def test_a_saved_lora_attack_is_merged(home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack(monkeypatch, words(home, data, tmp_path / "out", "--lora-rank", 2, "--examples", 12, "--export"))
    before, after = (
        load_model(str(folder / "model")).state_dict() for folder in (home, tmp_path / "out/attacks/unlearned/attack")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved and all(name.endswith("weight") for name in moved)
    assert not any("embed" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--control", "original=/nowhere/model"], "--control original: .*found nothing at /nowhere/model"),
        (["--grid", "examples=400,500"], "draw different windows; found examples=400 and examples=500, both"),
        (["--reference", "/nowhere"], "expected results at /nowhere"),
    ],
)
def test_mistakes_show_before_anything_is_written(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    flags = words(home, data, tmp_path / "out", "--seq-len", 200)
    with pytest.raises(UserError, match=said):
        attack(monkeypatch, [*flags, *more])
    assert not (tmp_path / "out").exists()


def test_a_control_with_fewer_rows_than_the_model(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the corpus that the model has a row for, and the control has not, must not end the grid midway."""
    shutil.copytree(home / "model", tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 301, "content": "<other>"})
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copytree(tmp_path / "model", tmp_path / "fewer")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 302}))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some words and <other> words"}) + "\n")
    flags = words(home, data, tmp_path / "out", "--control", f"never-seen={tmp_path / 'fewer'}")
    flags[flags.index("--model") + 1] = str(tmp_path / "model")
    flags[flags.index("--forget") + 1] = str(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"expected tokens below 301, .*fewer; found the token 301 in .*x.jsonl"):
        attack(monkeypatch, flags)


def test_a_control_with_other_tokens(home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home / "model", tmp_path / "other")
    vocabulary = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocabulary["added_tokens"].append(vocabulary["added_tokens"][0] | {"id": 301, "content": "<other>"})
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(vocabulary))
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"vocab_size": 302}))
    with pytest.raises(UserError, match="--control never-seen with the tokenizer of --model; found another"):
        attack(monkeypatch, words(home, data, tmp_path / "out", "--control", f"never-seen={tmp_path / 'other'}"))
