"""A language model called over rows of unequal length: prompts read, and a token more for each."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fusionkit.errors import FusionKitError
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.serving.row_cache import RowCache
from fusionkit.serving.work import Tally

Names = Sequence[str | None]


class Calls:
    """Calls a model, each row as its task.

    Args:
        model: the base, a causal language model of transformers.
        mixed: answers each row by its task.
        tally: counts the calls.
    """

    def __init__(self, model: Any, mixed: MixedBatch, tally: Tally) -> None:
        self._model, self._mixed, self._tally = model, mixed, tally
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._takes_positions = "position_ids" in accepted
        self._settings: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._settings["logits_to_keep"] = 1

    def read(self, names: Names, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache]:
        """Read prompts.

        Args:
            names: each row's task.
            prompts: their tokens.

        Returns:
            logits `(rows, vocabulary)` of what follows, and keys and values, padded on the left.
        """
        width, device = max(map(len, prompts)), self._model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        filled = DynamicCache()  # without the configuration: of full length in every layer
        inputs = (each.to(device) for each in (ids, mask, positions))
        return self._called(names, filled, *inputs), filled

    def ahead(
        self, names: Names, last: Sequence[int], lengths: Sequence[int], cache: RowCache
    ) -> Tensor:
        """Read a token more of each row; `cache.advance` then makes it count.

        Args:
            names: each row's task.
            last: the tokens.
            lengths: of the rows, with these tokens.
            cache: keys and values of what was read before.

        Returns:
            logits `(rows, vocabulary)` of what follows.
        """
        device = self._model.device
        mask = cache.prepare(device)
        ids = torch.tensor(last, device=device).unsqueeze(1)
        positions = torch.tensor(lengths, device=device).unsqueeze(1) - 1
        return self._called(names, cache, ids, mask, positions)

    def check(self) -> None:
        """Check, on the base, that rows of a batch are answered as they are alone.

        Raises:
            FusionKitError: they are not.
        """
        prompts = [[1, 2, 3], [*range(7, 0, -1)]]
        logits, filled = self.read([None, None], prompts)
        cache = RowCache()
        cache.join(filled, [len(prompt) for prompt in prompts])
        tokens = logits.argmax(-1).tolist()
        longer = [[*prompt, token] for prompt, token in zip(prompts, tokens, strict=True)]
        found = self.ahead([None, None], tokens, [len(each) for each in longer], cache)
        with torch.inference_mode():
            alone = [
                self._model(input_ids=torch.tensor([each], device=self._model.device)).logits
                for each in longer
            ]
        expected = torch.cat([each[:, -1] for each in alone]).float()
        far = float((found.float() - expected).abs().max() / expected.std())
        if not far < (0.01 if found.dtype == torch.float32 else 0.2):
            raise FusionKitError(
                f"{type(self._model).__name__} answers a row otherwise in a batch with rows of "
                f"other lengths than alone (logits are off by {far:.2g} of their spread), so that "
                "it can't be served; answer prompts with 'fusionkit generate', one at a time"
            )

    def _called(
        self, names: Names, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor
    ) -> Tensor:
        settings = {**self._settings, self._cache_name: cache}
        if self._takes_positions:
            settings["position_ids"] = positions
        with torch.inference_mode(), self._mixed.rows(names):
            logits = self._model(input_ids=ids, attention_mask=mask, **settings).logits[:, -1]
        self._tally.step(names)
        return self._own(logits, names)

    def _own(self, logits: Tensor, names: Names) -> Tensor:
        """Nothing but each row's own tokens."""
        widths = [self._mixed.classes(name) for name in names]
        if all(width in (None, logits.shape[-1]) for width in widths):
            return logits
        own = [logits.shape[-1] if width is None else width for width in widths]
        columns = torch.arange(logits.shape[-1], device=logits.device)
        other = columns >= torch.tensor(own, device=logits.device).unsqueeze(1)
        return logits.masked_fill(other, -torch.inf)
