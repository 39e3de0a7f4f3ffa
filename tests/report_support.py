"""A run's folder to report on, and its page as a browser would read it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from unlearn.launch.report import write_report
from unlearn.launch.report.config import ReportConfig

VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order, no id occurs twice."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        self.ids = set(ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_alone(page: Page, text: str) -> None:
    """Nothing on the page is fetched, nothing runs, and what it refers to is on it."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.elements)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "srcset", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,"))
            assert not value.startswith("#") or value[1:] in page.ids
    style = " ".join(re.findall(r"<style>.*?</style>", text, re.DOTALL))
    assert "@import" not in style and "url(" not in style
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= page.ids


def numbers(acc: float, **more: Any) -> dict[str, Any]:
    base = {"acc": acc, "interval": [acc - 0.1, acc + 0.1], "questions": 40, "predicted": [0.3, 0.3, 0.2, 0.2]}
    return base | {"debiased": acc, "debiased_interval": [acc - 0.1, acc + 0.1]} | more


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def result(model: str, tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {"summary": tasks, "data": {"wmdp_bio": {"sha256": "feed" * 16}}} | more
    return {"model_name": model, "unlearn": own, "lm_eval_version": "0.4.13", "group_subtasks": {}}


def make_run(tmp_path: Path) -> Path:
    """A finished run as its files tell it, with a result before and after, and an attack."""
    folder = tmp_path / "run"
    config = {"model": "base/model", "forget": "f.jsonl", "retain": "r.jsonl", "layers": [1, 2], "lora_rank": 4}
    write(folder / "config.json", config)
    lines = [
        {
            "step": step,
            "loss": 3.0 - step,
            "forget_loss": 2.0,
            "retain_loss": 0.1,
            "gradient_norm": 0.5,
            "adamw_lr": 0.1,
        }
        | {"entropy/1": 1.0, "entropy/2": 2.0}
        for step in range(3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "model").mkdir()
    write(folder / "evals/base/results_1.json", result("base/model", {"wmdp_bio": numbers(0.9)}))
    write(folder / "evals/own/results_2.json", result(str(folder / "model"), {"wmdp_bio": numbers(0.375)}))
    points = [{"step": step, "tasks": {"wmdp_bio": numbers(0.4 + step / 100)}} for step in (0, 10)]
    write(tmp_path / "some-attack/attack.json", {"config": {"model": str(folder / "model")}, "points": points})
    write(tmp_path / "other/attack.json", {"config": {"model": "elsewhere/model"}, "points": points})
    return folder


def report(folder: Path, **flags: Any) -> tuple[Page, str]:
    text = write_report(ReportConfig(str(folder), **flags)).read_text()
    page = Page(text)
    check_alone(page, text)
    return page, text
