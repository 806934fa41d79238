"""A GGUF file (llama.cpp's), read as the transformers model that it was made from.

Transformers' own code gives config, names and layouts, the package gguf the values; both are
loaded when such a file is opened.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.checkpoint import Checkpoint, Source, TensorSpec, reading
from fusionkit.checkpoints.config_limits import within_limits
from fusionkit.checkpoints.conformed import with_ties
from fusionkit.checkpoints.gguf_header import header_alone
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.checkpoints.quantized import DEQUANTIZE
from fusionkit.checkpoints.steady_file import SteadyFile
from fusionkit.errors import CheckpointError, listing

_MAGIC = b"GGUF"
_OTHERWISE = (
    "load it with transformers, AutoModelForCausalLM.from_pretrained(folder, gguf_file=…), save it "
    "with save_pretrained, and give that folder"
)


def open_gguf(source: Source, dequantize: bool) -> Checkpoint | None:
    """Open a GGUF file; None of any other source.

    Args:
        source: as of `Checkpoint.of`.
        dequantize: it may be dequantised.

    Raises:
        CheckpointError: it is one, and may not be dequantised, or can't be read.
    """
    if not isinstance(source, str | Path) or not _is_gguf(path := open_path(str(source))):
        return None
    if not dequantize:
        raise CheckpointError(f"{path} is quantised (GGUF), and {DEQUANTIZE}")
    opened = GGUFFile(path, str(source))
    return with_ties(opened, opened.architecture.tied)


class GGUFFile(Checkpoint):
    """A GGUF file as a transformers model: its names and shapes, in float32 as transformers has it.

    A tensor is read, and dequantised, when it is asked for.

    Args:
        path: the file.
        label: how messages call it.

    Raises:
        CheckpointError: it is not whole, of an architecture that transformers does not read, or
            what reads it is not installed.
    """

    dequantized = True
    architecture: Architecture

    def __init__(self, path: Path, label: str) -> None:
        if is_remote(path):
            raise CheckpointError(f"{path}: a GGUF file is read from the local disk; copy it there")
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file; check the path (relative to {Path.cwd()})"
            )
        try:
            import gguf

            reader = import_module("transformers.modeling_gguf_pytorch_utils")
        except ImportError as error:
            raise CheckpointError(
                f"{path}: a GGUF file needs more: {error}; pip install 'fusionkit[gguf]'"
            ) from error
        self.label, self.files = label, (path,)
        try:
            self._file = SteadyFile(path)
            self.nbytes = self._file.size
            with header_alone(self._file) as header:
                config = _short(reader.load_gguf_checkpoint(str(header))["config"])
                file = gguf.GGUFReader(header)
                kind = reader.read_field(file, "general.architecture")[0]
                tensors = [_Stored.of(tensor) for tensor in file.tensors]
                del file
            model = _model(config)
            processor = reader.TENSOR_PROCESSORS.get(kind, reader.TensorProcessor)
            self._processor: Any = processor(config=config)
            self._names: dict[str, str] = reader.get_gguf_hf_weights_map(model, self._processor)
        except Exception as error:  # what transformers and gguf raise is of any kind
            raise CheckpointError(
                f"{path}: can't be read as a GGUF file ({error}); fetch it again if it is not "
                f"whole, else {_OTHERWISE}"
            ) from error
        self._stored: dict[str, list[_Stored]] = {}
        for tensor in tensors:
            name = self._names.get(tensor.name)
            name = name or self._names.get(tensor.name.removesuffix(".weight"))  # stacks of experts
            if name:
                self._stored.setdefault(name, []).append(tensor)
        self.architecture = Architecture.of(model, {"config": _said(model)})
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._check(shapes, model)
        self.specs = {
            name: TensorSpec(shape, torch.float32)
            for name, shape in shapes.items()
            if name in self._stored
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, dequantise it, and undo what llama.cpp does to it."""
        with reading(self.label, name):
            shape = self.specs[name].shape
            made: dict[str, dict[str, Tensor]] = {"tensors": {}}  # where stacks are put together
            for stored in self._stored[name]:
                result = self._processor.process(
                    weights=stored.values(self._file),
                    name=stored.name,
                    tensor_key_mapping=self._names,
                    parsed_parameters=made,
                )
                if result.name is not None:
                    made["tensors"][name] = torch.tensor(result.weights)
            tensor = made["tensors"][name].to(torch.float32)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{self.label}: tensor '{name}' has shape {list(tensor.shape)}, the model's "
                    f"has {list(shape)}; {_OTHERWISE}"
                )
            return tensor

    def _check(self, shapes: dict[str, tuple[int, ...]], model: nn.Module) -> None:
        """Check that the file has all that the model needs.

        Raises:
            CheckpointError: it has not.
        """
        from fusionkit.checkpoints.live_model import aliases

        findings = []
        tied = aliases(model)
        for name, shape in shapes.items():
            stored = self._stored.get(name, [])
            count, wanted = sum(each.count for each in stored), torch.Size(shape).numel()
            if not stored and name not in tied:
                findings.append(f"'{name}' is missing")
            elif stored and count != wanted:
                findings.append(f"'{name}' has {count} values, the model's has {wanted}")
        if findings:
            raise CheckpointError(
                f"{self.label}: is not the model that its config describes:{listing(findings)}\n"
                f"{_OTHERWISE}"
            )


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file."""

    name: str
    kind: int
    offset: int
    shape: tuple[int, ...]
    dtype: str
    count: int

    @classmethod
    def of(cls, tensor: Any) -> "_Stored":
        data = tensor.data
        return cls(
            tensor.name,
            int(tensor.tensor_type),
            int(tensor.data_offset),
            tuple(map(int, data.shape)),
            data.dtype.str,
            int(tensor.n_elements),
        )

    def values(self, file: SteadyFile) -> Any:
        """Dequantised, a NumPy array, float32."""
        import gguf
        import numpy as np

        dtype = np.dtype(self.dtype)
        size = torch.Size(self.shape).numel() * dtype.itemsize
        data = file.read(self.offset, size).numpy().view(dtype)
        kind = gguf.GGMLQuantizationType(self.kind)
        return gguf.dequantize(data.reshape(self.shape), kind)


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    if is_remote(path) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def _said(model: Any) -> dict[str, Any]:
    """A model's configuration as its `config.json` would have it."""
    said: dict[str, Any] = json.loads(model.config.to_json_string())
    return {**said, "architectures": [type(model).__name__]}


def _short(value: Any) -> Any:
    """What a configuration says, its numbers as they were before they were stored in float32."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    stored = isinstance(value, float) and float(np.float32(value)) == value
    return float(str(np.float32(value))) if stored else value


def _model(config: dict[str, Any]) -> nn.Module:
    """The model that a config describes, on the meta device."""
    import transformers

    known = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    automatic: tuple[Any, ...] = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    )
    with within_limits(config), torch.device("meta"):
        if known.architectures:
            model: nn.Module = getattr(transformers, known.architectures[0])(known)
        else:
            model = next(
                each.from_config(known) for each in automatic if type(known) in each._model_mapping
            )
    return model
