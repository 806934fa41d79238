"""A bundle's language models, asked with text: one model, switched in place among the tasks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.errors import FusionKitError
from fusionkit.reuse.beside import same_tokenizer, tokenizer
from fusionkit.reuse.loaded import load, switch
from fusionkit.reuse.prompts import Messages, has_template, prompt_tokens


class Speaker:
    """One model that answers as any task of a bundle; causal, or encoder-decoder.

    Args:
        bundle: the bundle.
        task: the first task; None: the base.
        device: as of `fusionkit.load`.
        dtype: as of `fusionkit.load`.
        max_new_tokens: how long answers may be; as far as the model's context has room.
        temperature: 0: the likeliest token, always; else tokens are drawn, with a sharper
            distribution below 1.

    Attributes:
        task: the active task.
        model: its model.
        tokenizer: its tokenizer.

    Raises:
        BundleError: as of `fusionkit.load` and `fusionkit.tokenizer`.
        FusionKitError: the model can't generate.
    """

    def __init__(
        self,
        bundle: Bundle,
        task: str | None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0:
            raise FusionKitError(
                f"expected max_new_tokens of at least 1 and a temperature of at least 0, got "
                f"{max_new_tokens} and {temperature}"
            )
        self.bundle, self.task = bundle, task
        self.tokenizer: Any = tokenizer(bundle, task)
        self.model: Any = load(bundle, task, device=device, dtype=dtype)
        if not callable(getattr(self.model, "can_generate", None)) or not self.model.can_generate():
            raise FusionKitError(
                f"{bundle.path}: {type(self.model).__name__} can't generate text: it is no causal "
                "and no encoder-decoder language model; score it with 'fusionkit test'"
            )
        self._longest = max_new_tokens
        self._settings: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": 1}
        if temperature > 0:
            self._settings["temperature"] = temperature
        else:
            self._settings |= {"temperature": None, "top_p": None, "top_k": None}

    def switch(self, task: str | None) -> None:
        """Answer as another task; None: as the base.

        Raises:
            BundleError: the bundle has no such task.
        """
        if task == self.task:
            return
        same = same_tokenizer(self.bundle, self.task, task)
        found = self.tokenizer if same else tokenizer(self.bundle, task)
        switch(self.model, self.bundle, task)
        self.tokenizer, self.task = found, task

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer knows how a conversation is written."""
        return has_template(self.tokenizer)

    @property
    def context(self) -> int | None:
        """How many tokens the model can look at; None: it sets no limit."""
        config = self.model.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return int(found) if found else None

    def tokens(self, prompt: str | Messages) -> list[int]:
        """A prompt as the model reads it: a text as it is, a conversation by its chat template.

        Raises:
            FusionKitError: there is no chat template, or it refuses the messages; or the prompt
                is empty, or longer than the model's context.
        """
        whose = "its base" if self.task is None else f"task '{self.task}'"
        found = prompt_tokens(
            self.tokenizer, prompt, f"{self.bundle.path}: the tokenizer of {whose}"
        )
        context = self.context
        room = len(found) + (0 if self.model.config.is_encoder_decoder else 1)
        if context is not None and room > context:
            raise FusionKitError(
                f"the prompt has {len(found)} tokens, and the model's context is {context}, the "
                "answer included; shorten the prompt"
            )
        if not found:
            raise FusionKitError("the prompt is empty; give at least one token")
        return found

    def say(self, prompt: Sequence[int], streamed: bool = False) -> str:
        """The answer to one prompt.

        Args:
            prompt: its tokens.
            streamed: print the answer, word by word.
        """
        streamer = None
        if streamed:
            from transformers import TextStreamer

            streamer = TextStreamer(self.tokenizer, self._decoder_only, skip_special_tokens=True)
        return self._generated([prompt], streamer)[0]

    def answers(
        self, prompts: Sequence[Sequence[int]], batch_size: int = 8
    ) -> Iterator[tuple[int, str]]:
        """The answers to many prompts, the longest prompts first: the same as one by one.

        Args:
            prompts: their tokens.
            batch_size: how many are answered at once, padded to one length.

        Yields:
            a prompt's place among them, and the answer.
        """
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        while order:
            # One whose answer the context cuts short would cut the others', too.
            count = batch_size if self._fits(prompts[order[0]]) else 1
            batch, order = order[:count], order[count:]
            yield from zip(batch, self._generated([prompts[each] for each in batch]), strict=True)

    @property
    def _decoder_only(self) -> bool:
        return not self.model.config.is_encoder_decoder

    def _fits(self, prompt: Sequence[int]) -> bool:
        return self.context is None or self._read(prompt) + self._longest <= self.context

    def _read(self, prompt: Sequence[int]) -> int:
        """How much of the context that answers are in a prompt takes."""
        return len(prompt) if self._decoder_only else 1

    def _generated(self, prompts: Sequence[Sequence[int]], streamer: Any = None) -> list[str]:
        width = max(map(len, prompts))
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        pad = next((token for token in known if token is not None), 0)
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            # What comes next follows the prompt; an encoder counts positions from the start.
            start = width - len(prompt) if self._decoder_only else 0
            ids[row, start : start + len(prompt)] = torch.tensor(prompt)
            mask[row, start : start + len(prompt)] = 1
        longest = self._longest
        if self.context is not None:
            longest = min(longest, self.context - self._read(range(width)))
        device = self.model.device
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=longest,
                pad_token_id=pad,
                streamer=streamer,
                **self._settings,
            )
        own = made[:, width:] if self._decoder_only else made
        found: list[str] = self.tokenizer.batch_decode(own, skip_special_tokens=True)
        return found


def open_speaker(
    bundle: str | Path, task: str | None, base: str | None, device: str | None, **settings: Any
) -> Speaker:
    """A bundle's speaker, on the GPU where there is one.

    Args:
        bundle: the bundle's folder, or its name on the Hugging Face Hub.
        task: the first task; None: the bundle's first.
        base: the base, where it is not where the bundle says.
        device: where to run; None: see above.
        settings: as of `Speaker`.
    """
    source = Bundle.from_pretrained(bundle, base)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Speaker(source, task or source.tasks[0], device=device, **settings)
