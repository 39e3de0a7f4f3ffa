"""Prompts in a tokenizer's own chat template, as lm-eval's `--apply_chat_template` makes them."""

from collections.abc import Callable
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError

ChatTemplate = Callable[..., str]  # (messages, add_generation_prompt) -> prompt


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """What turns messages into a prompt, with lm-eval's treatment of templates that refuse a system message.

    Raises:
        UserError: the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "expected a tokenizer with a chat template for --chat-template; found none: ask a base model without it"
        )

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except jinja2.TemplateError:
            others = [message for message in messages if message["role"] != "system"]
            return str(tokenizer.apply_chat_template(others, **options))

    return render
