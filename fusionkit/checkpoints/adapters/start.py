"""Where adapters start from: the point that their own task vectors are taken from.

An (IA)³ vector starts at 1. LoRA factors start at a random draw, which PEFT does not save: where
`fusionkit fit` trained them, the seed that replays it, or the tensors themselves, are on record;
otherwise their task vectors are taken from 0.
"""

import hashlib
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from fusionkit.checkpoints.adapters.adapter import Adapter
from fusionkit.checkpoints.adapters.folder import RECORD
from fusionkit.checkpoints.adapters.kinds import LoraModule
from fusionkit.checkpoints.adapters.layout import AdapterLayout
from fusionkit.checkpoints.paths import is_file_name
from fusionkit.checkpoints.safetensors_file import SafetensorsFile
from fusionkit.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

_ALONE = threading.Lock()


@dataclass(frozen=True)
class Seeded:
    """A draw of PEFT's that its seed replays.

    Attributes:
        seed: set just before the adapters were put into the model.
        init: PEFT's `init_lora_weights`.
        order: the adapted modules in the model's order, in which they were drawn.
        sha256: of the drawn tensors, so that a replay can be told from another draw.
    """

    seed: int
    init: bool | str
    order: list[str]
    sha256: str

    def replay(self, layout: AdapterLayout, shapes: Shapes) -> dict[str, Tensor] | None:
        """Draw again, through PEFT itself; None where another draw comes out.

        Args:
            layout: the adapters'.
            shapes: of their tensors, by name.
        """
        from peft import LoraConfig, inject_adapter_in_model

        modules = {module.name: module for module in layout.modules}
        if set(self.order) != modules.keys():
            return None
        skeleton = nn.Module()
        ranks = {}
        for name in self.order:
            module = modules[name]
            assert isinstance(module, LoraModule)
            a, b = (shapes[tensor] for tensor in module.tensors[:2])
            _place(skeleton, name, _layer(module, a, b))
            ranks["^" + re.escape(name)] = a[0]
        config = LoraConfig(
            target_modules=list(self.order),
            rank_pattern=ranks,
            init_lora_weights=self.init,  # type: ignore[arg-type]
            lora_bias=any(isinstance(m, LoraModule) and m.bias for m in modules.values()),
        )
        # The random state and the warnings' filters are all threads'.
        with _ALONE, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            inject_adapter_in_model(config, skeleton)
        state = {name.replace(".default", ""): t for name, t in skeleton.state_dict().items()}
        drawn = {name: state[name] for name in layout.tensors}
        return drawn if digest(drawn) == self.sha256 else None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def start_of(adapter: Adapter, layout: AdapterLayout) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's initial tensors, and how they are known.

    Returns:
        the record: `{"constant": 0 or 1}`, the fields of `Seeded`, or `{"stored": true}`; and the
        tensors by name.

    Raises:
        CheckpointError: what is on record can't be replayed or read, or there is no record of
            where a linearized adapter started.
    """
    shapes = {name: adapter.tensors.specs[name].shape for name in layout.tensors}
    if adapter.initial is not None:
        return {"stored": True}, {name: adapter.initial[name] for name in shapes}
    record = adapter.start.get("start")
    if record is None:
        if adapter.linearized:
            raise CheckpointError(
                f"{adapter.label}: is linearized, but {RECORD}, which says around what, is "
                "missing; copy the folder whole"
            )
        return constant(layout, shapes)
    try:
        if "file" in record:
            return {"stored": True}, _stored(adapter, record["file"], shapes)
        seeded = msgspec.convert(record, Seeded)
    except (TypeError, KeyError, ValueError, CheckpointError) as error:
        raise CheckpointError(
            f"{adapter.label}: {RECORD} is damaged ({error!r}); copy the folder again"
        ) from error
    drawn = seeded.replay(layout, shapes)
    if drawn is None:
        raise CheckpointError(
            f"{adapter.label}: the installed PEFT draws another start from seed {seeded.seed} than "
            "the one it was trained from; install the PEFT that trained it"
        )
    return record, drawn


def _stored(adapter: Adapter, file: str, shapes: Shapes) -> dict[str, Tensor]:
    """The initial tensors that lie in a file beside an adapter's own.

    Raises:
        ValueError: they are of other shapes, or the file lies elsewhere.
        KeyError: there is none of them.
        CheckpointError: the file can't be read.
    """
    if not is_file_name(file):
        raise ValueError(f"'{file}' lies outside the adapter's folder")
    path = (adapter.folder or Path()) / file
    tensors = SafetensorsFile(path, str(path))
    found = {name: tensors[name] for name in shapes}
    if odd := [name for name, shape in shapes.items() if found[name].shape != torch.Size(shape)]:
        raise ValueError(f"'{odd[0]}' has another shape in {file} than in the adapter")
    return found


def constant(layout: AdapterLayout, shapes: Shapes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The start of adapters whose draw is not known: 0, or 1 for (IA)³."""
    value = 1.0 if layout.kind == "ia3" else 0.0
    return {"constant": value}, {name: torch.full(shapes[name], value) for name in layout.tensors}


def _layer(module: LoraModule, a: tuple[int, ...], b: tuple[int, ...]) -> nn.Module:
    """A layer that PEFT adapts with factors of these shapes; its own weights are never set."""
    make: Any = nn.utils.skip_init
    if module.form == "embedding":
        return make(nn.Embedding, a[1], b[0])  # type: ignore[no-any-return]
    if module.form == "conv":
        kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        return make(kinds[len(a)], a[1], b[0], a[2:])  # type: ignore[no-any-return]
    return make(nn.Linear, a[1], b[0], bias=module.bias)  # type: ignore[no-any-return]


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, layer)
