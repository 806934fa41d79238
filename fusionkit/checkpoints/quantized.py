"""Quantised checkpoints: recognised, refused where deltas would be rounded away, and dequantised.

What a checkpoint is, its tensors say: their names, dtypes and siblings. The folder's `config.json`
adds what they can't: blocks, versions, the model's dtype, and the names of methods not known here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, TensorSpec, reading
from fusionkit.checkpoints.conformed import conformed
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.quantized_finders import INTEGERS, Clues, find
from fusionkit.checkpoints.quantized_weights import BnbInt8, QuantizedWeight, Unreadable
from fusionkit.checkpoints.view import renamed
from fusionkit.errors import CheckpointError

DEQUANTIZE = (
    "a delta would be rounded away in it; give the unquantised model, or open it as "
    "Checkpoint.of(…, dequantize=True) (--dequantize beside the models of a command line; in a "
    "recipe `class_path: fusionkit.Checkpoint.of` with `dequantize: true`)"
)
"""Why what is quantised is refused, and what to do where it can be dequantised."""

_READABLE = {"bitsandbytes", "gptq", "awq", "fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors"}
"""Methods, as `quant_method` has them, all of whose formats are told by the tensors."""

_LEFT_BEHIND = {"bitsandbytes"}
"""Methods that configs name of models which were merged, and saved, without quantisation since."""

_NO_SENSE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What comes of settings, shapes and values that don't go together."""
_AGAIN = "fetch it again, or give the unquantised model"

_NESTED = ("text_config", "language_config", "llm_config")
"""Where the config of a model of several parts keeps that of its language model."""


def unquantized(checkpoint: Checkpoint, task: str = "") -> Checkpoint:
    """A checkpoint without quantised weights: what base and fine-tuned models must be.

    A delta added to quantised weights would be rounded to their few bits, and lost. The int8 of
    bitsandbytes keeps names and shapes and is no more than a scale away, so it is dequantised;
    anything else only where it is asked for.

    Args:
        checkpoint: the checkpoint; comes back as it is, if it is not quantised.
        task: whose it is; by default it is the base.

    Raises:
        CheckpointError: it is quantised otherwise; the message says how, and what to do.
    """
    found = quantized_weights(checkpoint.as_stored)
    if all(isinstance(weight, BnbInt8) for weight in found):
        return _dequantized(checkpoint, found) if found else checkpoint
    whose = f"task '{task}'" if task else "the base"
    first = next((weight for weight in found if isinstance(weight, Unreadable)), found[0])
    said = f"{checkpoint.label} ({whose}) is quantised ({first.method}: '{first.tensor}')"
    if isinstance(first, Unreadable):
        raise CheckpointError(
            f"{said}, and can't be dequantised here: {first.reason}; {first.mend}"
        )
    raise CheckpointError(f"{said}, and {DEQUANTIZE}")


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as the unquantised model's, dequantised tensor by tensor as it is read.

    Args:
        checkpoint: the checkpoint; comes back as it is, if it is not quantised.

    Raises:
        CheckpointError: a tensor can't be dequantised; the message says why.
    """
    found = quantized_weights(checkpoint.as_stored)
    for weight in found:
        if isinstance(weight, Unreadable):
            raise CheckpointError(
                f"{checkpoint.label}: tensor '{weight.tensor}' ({weight.method}) can't be "
                f"dequantised here: {weight.reason}; {weight.mend}"
            )
    return _dequantized(checkpoint, found) if found else checkpoint


def _dequantized(checkpoint: Checkpoint, found: list[QuantizedWeight]) -> Checkpoint:
    """Dequantised under the names that are stored, then seen as its class and prefixes have it."""
    below = Dequantized(checkpoint.as_stored, found)
    if checkpoint.as_stored is checkpoint:
        return below
    seen = conformed(below, checkpoint.architecture)
    return renamed(seen, checkpoint.strip_prefix, checkpoint.add_prefix)


class Dequantized(Checkpoint):
    """A quantised checkpoint as the unquantised model's: names, shapes and dtypes as there.

    A weight's dtype is that of `config.json`, else that of its scales where these have 16 bits or
    more, else bfloat16. What was not quantised is as stored.

    Args:
        checkpoint: the quantised one.
        weights: those that are to be dequantised.
    """

    dequantized = True

    def __init__(self, checkpoint: Checkpoint, weights: list[QuantizedWeight]) -> None:
        settings = Settings.of(checkpoint)
        self._below = checkpoint
        self._weights = {weight.name: weight for weight in weights}
        spent = {name for w in weights for name in (*w.parts.values(), *w.dropped)}
        spent |= {name for name in checkpoint if _is_cache_scale(name, checkpoint.specs[name])}
        self.label, self.nbytes = checkpoint.label, checkpoint.nbytes
        self.live, self.serial = checkpoint.live, checkpoint.serial
        self.files = (*checkpoint.files, *settings.files)
        self.strip_prefix, self.add_prefix = checkpoint.strip_prefix, checkpoint.add_prefix
        self.variant, self.unread = checkpoint.variant, checkpoint.unread
        first = {weight.tensor: weight for weight in weights}
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in checkpoint.specs.items():
            if name in first:
                weight = first[name]
                self.specs[weight.name] = TensorSpec(weight.shape, settings.dtype or weight.dtype)
            elif name not in spent:
                self.specs[name] = spec
        self.buffers = checkpoint.buffers & self.specs.keys()
        new = {name: name for name in self.specs} | {n: w.name for n, w in first.items()}
        self.aliases = {
            new[alias]: new[name]
            for alias, name in checkpoint.aliases.items()
            if alias in new and name in new
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, and dequantise it."""
        with reading(self.label, name):
            spec = self.specs[name]
            if name not in self._weights:
                return self._below[name]
            weight = self._weights[name]
            parts = {part: self._below[n] for part, n in weight.parts.items()}
        try:
            return weight.values(parts).reshape(spec.shape).to(spec.dtype)
        except _NO_SENSE as error:
            raise CheckpointError(
                f"{self.label}: tensor '{name}' ({weight.method}) can't be dequantised "
                f"({type(error).__name__}: {error}); {_AGAIN}"
            ) from error

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece; what is dequantised is made whole."""
        return super().pieces(name) if name in self._weights else self._below.pieces(name)

    def prefetch(self, name: str) -> None:
        """Have what a tensor is made of read ahead."""
        weight = self._weights.get(name)
        for each in weight.parts.values() if weight else [name]:
            self._below.prefetch(each)


@dataclass(frozen=True)
class Settings:
    """What the config beside a checkpoint's files says.

    Attributes:
        config: the folder's `config.json`; empty where there is none.
        files: the files that were read.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Settings":
        """Those of the folder that a checkpoint's first file is in.

        Raises:
            CheckpointError: there is a config, and it is not JSON.
        """
        if not checkpoint.files:
            return cls()
        path = checkpoint.files[0].parent / "config.json"
        try:
            config = read_json(path)
        except OSError:
            return cls()
        except ValueError as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
        return cls(config, (path,)) if isinstance(config, dict) else cls()

    @property
    def _configs(self) -> list[Mapping[str, Any]]:
        nested = [self.config.get(name) for name in _NESTED]
        return [self.config, *(each for each in nested if isinstance(each, dict))]

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """The section on quantisation."""
        for config in self._configs:
            for key in ("quantization_config", "compression_config"):
                if isinstance(config.get(key), dict):
                    return dict(config[key])
        return {}

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.quantization.get("quant_method", ""))

    @property
    def dtype(self) -> torch.dtype | None:
        """The model's dtype, where it is one of floats."""
        for config in self._configs:
            said = str(config.get("dtype") or config.get("torch_dtype") or "")
            dtype = getattr(torch, said.removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
        return None


def quantized_weights(checkpoint: Checkpoint) -> list[QuantizedWeight]:
    """What of a checkpoint is quantised; nothing of one that is not.

    Reads no weights, and no file but of a checkpoint that has integers or float8 in it.

    Raises:
        CheckpointError: the folder's config can't be read.
    """
    if not any(spec.dtype in INTEGERS and spec.numel > 1 for spec in checkpoint.specs.values()):
        return []
    settings = Settings.of(checkpoint)
    try:
        return list(_found(checkpoint, settings))
    except _NO_SENSE as error:
        told = f" and {settings.files[0]}" if settings.files else ""
        raise CheckpointError(
            f"{checkpoint.label}{told}: how it is quantised can't be made sense of "
            f"({type(error).__name__}: {error}); {_AGAIN}"
        ) from error


def _found(checkpoint: Checkpoint, settings: Settings) -> Iterator[QuantizedWeight]:
    method, kind = settings.method, str(settings.config.get("model_type", ""))
    if not method or method in _READABLE:
        found = list(find(Clues(checkpoint, settings.quantization, kind)))
        if found or not method or method in _LEFT_BEHIND:
            yield from found
            return
    for name, spec in checkpoint.specs.items():
        if spec.dtype in INTEGERS and spec.numel > 1:
            yield Unreadable(
                name,
                method,
                {"weight": name},
                spec.shape,
                torch.bfloat16,
                reason="the way it is stored is not known",
                mend="give the unquantised model",
            )


def _is_cache_scale(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor scales the attention's cache, which no unquantised model has."""
    return name.rpartition(".")[2] in ("k_scale", "v_scale", "q_scale") and spec.numel == 1
