"""A bundle's task as a model of lm-eval, `--model fusionkit`.

lm-eval finds it by its entry point `lm_eval.models`, from the version on that looks there; before,
by `fusionkit lm_eval`, which is its own command, or by an import of this module.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from fusionkit.errors import UsageError, in_line, meant
from fusionkit.reuse.beside import opened, tokenizer
from fusionkit.reuse.loaded import load
from fusionkit.tasks.harness import check_generates, quiet, ties_kept

SETTINGS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token"),
    *("prefix_token_id", "logits_cache", "softmax_dtype", "mixed_precision_dtype"),
    *("think_end_token", "enable_thinking", "chat_template_args", "backend", "trust_remote_code"),
)
"""Arguments of `HFLM` that mean something of a model in memory."""


@register_model("fusionkit")
class FusionKitLM(HFLM):  # type: ignore[misc]
    """A task's model, as lm-eval's `hf` would have it of the exported folder.

    Args:
        bundle: the bundle's folder, or its name on the Hugging Face Hub.
        task: one of its tasks.
        base: the base model, where it is not where the bundle says.
        device: where to; by default the GPU, where there is one.
        dtype: of the weights; by default as of `fusionkit.load`.
        attn_implementation: as of transformers' `from_pretrained`.
        settings: `HFLM`'s own, those in `SETTINGS`.

    Raises:
        UsageError: no task is given, or there is no such setting.
        BundleError: as of `fusionkit.load`.
        FusionKitError: the model is no language model.
    """

    def __init__(
        self,
        bundle: str,
        task: str | None = None,
        base: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        **settings: Any,
    ) -> None:
        own = ("bundle", "task", "base", "device", "dtype", "attn_implementation")
        for name in settings:
            if name not in SETTINGS:
                raise UsageError(
                    f"--model_args: no '{name}'{meant(name, [*own, *SETTINGS])}; there is "
                    f"{in_line([*own, *SETTINGS], 99)}"
                )
        source = opened(str(bundle), base)
        if task is None:
            raise UsageError(
                f"--model_args: say which task, bundle={bundle},task=…: {in_line(source.tasks)} "
                "(the base by itself is --model hf)"
            )
        name = str(task)  # lm-eval has made '7' a number
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        told = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
        model: Any = load(source, name, **told)
        check_generates(model)
        with quiet(), ties_kept(model):
            super().__init__(pretrained=model, tokenizer=tokenizer(source, name), **settings)
