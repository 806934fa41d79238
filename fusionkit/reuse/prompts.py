"""A prompt as tokens: a text as it is, a conversation by its tokenizer's chat template."""

from typing import Any

from fusionkit.errors import FusionKitError

Messages = list[dict[str, Any]]
"""A conversation, as chat templates take it: `{"role": "user", "content": "…"}`, …"""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer: Any, prompt: str | Messages, label: str) -> list[int]:
    """A prompt as the model reads it.

    Args:
        tokenizer: the task's.
        prompt: a text, or a conversation.
        label: how messages call the tokenizer.

    Raises:
        FusionKitError: there is no chat template, or it refuses the messages.
    """
    if isinstance(prompt, str):
        return [*tokenizer(prompt)["input_ids"]]
    if not has_template(tokenizer):
        raise FusionKitError(
            f"{label} has no chat template, which `messages` need; give `prompt`, a plain text, or "
            "put a chat_template.jinja beside the base's tokenizer"
        )
    try:
        found: list[int] = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise FusionKitError(
            f"the chat template can't write these messages ({error}); each has `role` and "
            "`content`, in an order that the template takes"
        ) from error
    return found
