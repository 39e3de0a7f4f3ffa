"""The YAML header of a model card, by which the hub files it."""

from typing import Any

from unlearn.launch.share import Share


def header(share: Share) -> str:
    """The header's lines; what is not known is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=str(numbers.get("metric", "acc")),
            metric_value=round(float(numbers["acc"]), 4),
            metric_name=_metric(numbers),
        )
        for task, numbers in share.tasks(share.record.after).items()
    ]
    named: dict[str, Any] = {"model_name": share.title, "eval_results": measured} if measured else {}
    if share.base is not None:
        named |= {"base_model": share.base}
        named |= {"base_model_relation": "adapter" if share.config.what == "adapter" else "finetune"}
    data = ModelCardData(
        library_name="peft" if share.config.what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", f"unlearning-{share.method}", *(["lora"] if share.record.config.get("lora_rank") else [])],
        **(named | share.license),
    )
    return data.to_yaml() + "\n"


def _metric(numbers: dict[str, Any]) -> str:
    """The metric with what it rests on."""
    low, high = numbers.get("interval", (None, None))
    interval = "" if low is None else f", 95 % interval {low:.3f} to {high:.3f}"
    count = f", {numbers['questions']:,} questions" if "questions" in numbers else ""
    return f"{numbers.get('metric', 'acc')}{interval}{count}"
