"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

Read without PEFT itself: names and shapes say what an adapter is, its config how it scales. What
is not known here (DoRA, a quantised start, …) is refused by name, never read as something else.

`fusionkit.json` beside them, which `fusionkit fit` writes and PEFT ignores, says where training
started: the seed that draws the initial tensors, or the file that holds them. A linearized adapter
(L-LoRA) is another function of its tensors than a LoRA: its `peft_type` is `LINEARIZED_LORA`, so
that plain PEFT refuses it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.adapters.layout import AdapterLayout, Ia3Module, LoraModule, Module
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.view import View
from fusionkit.errors import CheckpointError, FamilyError, listing

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
RECORD = "fusionkit.json"
LINEARIZED = "LINEARIZED_LORA"
PREFIX = "base_model.model."

_ADAPTER_TENSOR = re.compile(
    r"(.+)\.(?:lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|ia3_l)"
)
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")
_KINDS = {"LORA": "lora", LINEARIZED: "lora", "IA3": "ia3"}

# Settings that change nothing in how saved tensors are read, whatever their value.
_NEUTRAL = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Starts that change the base itself, so that the saved factors belong to another one.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def is_adapter(source: object) -> bool:
    """Whether a source is the path of a PEFT adapter's folder."""
    if not isinstance(source, str | Path):
        return False
    return (open_path(str(source)) / CONFIG).is_file()


class AdapterFolder:
    """An adapter's folder, opened: its config and its tensors, read one at a time.

    Args:
        path: the folder.

    Attributes:
        label: how messages call it.
        files: the files in it.
        config: the content of `adapter_config.json`.
        tensors: its tensors, named as the base would name them.
        start: the content of `fusionkit.json`; empty where there is none.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter's kind is not known.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = open_path(str(path))
        self.label = str(path)
        self.config = _read_json(self.path / CONFIG)
        self._refuse_unknown()
        file = next((self.path / name for name in TENSORS if (self.path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path}: has {CONFIG} but none of {', '.join(TENSORS)}")
        self.start = _read_json(self.path / RECORD) if (self.path / RECORD).is_file() else {}
        self.files = tuple(path for path in sorted(self.path.iterdir()) if path.is_file())
        self.tensors = _plain(Checkpoint.of(str(file)), self.label, self.files)
        self._refuse_tensors()

    @property
    def linearized(self) -> bool:
        """Whether the tensors are those of a linearized LoRA."""
        return bool(self.config["peft_type"] == LINEARIZED)

    @property
    def whole(self) -> list[str]:
        """Names of the tensors that replace the base's: heads, biases, …."""
        return [name for name in self.tensors if _adapted(name) is None]

    def layout(self, base: Checkpoint) -> AdapterLayout:
        """What the adapter does to a base.

        Raises:
            FamilyError: it is an adapter of another base, by names or shapes.
            CheckpointError: a factor is missing, or has another rank than the config says.
        """
        names = {module: None for name in self.tensors if (module := _adapted(name)) is not None}
        foreign = [f"'{name}'" for name in names if f"{name}.weight" not in base]
        if foreign:
            raise FamilyError(
                f"{self.label}: adapts modules that the base {base.label} lacks:{listing(foreign)}"
                f"\nan adapter of another base? the base's names begin like '{min(base)}'; give "
                "the base's add_prefix or strip_prefix if only that differs"
            )
        place = {name: number for number, name in enumerate(base)}
        ordered = sorted(names, key=lambda name: place[f"{name}.weight"])
        make = self._ia3 if self.config["peft_type"] == "IA3" else self._lora
        kind: Any = _KINDS[self.config["peft_type"]]
        layout = AdapterLayout(kind, tuple(make(name, base) for name in ordered))
        self._refuse_ambiguous(layout, base)
        return layout

    def _refuse_ambiguous(self, layout: AdapterLayout, base: Checkpoint) -> None:
        """A square matrix's layout is told by one flag for all: which must hold for the others."""
        flag = "transposed" if self.config.get("fan_in_fan_out") else "linear"
        square, against = [], []
        for module in layout.modules:
            shape = base.specs[f"{module.name}.weight"].shape
            if isinstance(module, LoraModule) and module.form in {"linear", "transposed"}:
                if shape[0] == shape[1]:
                    square.append(f"'{module.name}'")
                elif module.form != flag:
                    against.append(f"'{module.name}'")
        if square and against:
            raise CheckpointError(
                f"{self.label}: fan_in_fan_out in {CONFIG} is wrong for {against[0]}, so that it "
                f"can't be told how these square matrices lie:{listing(square)}\nadapt layers of "
                "one kind only, or merge the adapter into its base with PEFT"
            )

    def _lora(self, name: str, base: Checkpoint) -> Module:
        embedding = f"{name}.lora_embedding_A" in self.tensors
        keys = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        for key, other in zip(keys, reversed(keys), strict=True):
            if f"{name}.{key}" not in self.tensors:
                raise CheckpointError(
                    f"{self.label}: has '{name}.{other}' but no '{name}.{key}'; save the adapter "
                    "again"
                )
        a, b = (self.tensors.specs[f"{name}.{key}"].shape for key in keys)
        config = self.config
        rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        if a[0] != rank or len(b) < 2 or b[1] != rank:
            raise CheckpointError(
                f"{self.label}: module '{name}' has factors of shapes {list(a)} and {list(b)}, but "
                f"{CONFIG} gives it rank {rank}; mend r or rank_pattern there, or save again"
            )
        weight = f"{name}.weight"  # its own, of a module that was resized before it was adapted
        shape = (self.tensors if weight in self.tensors else base).specs[weight].shape
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return LoraModule(
            name,
            self._form(name, a, b, shape, embedding),
            scale,
            bias=f"{name}.lora_B.bias" in self.tensors,
            linearized=self.linearized,
        )

    def _form(
        self,
        name: str,
        a: tuple[int, ...],
        b: tuple[int, ...],
        weight: tuple[int, ...],
        embedding: bool,
    ) -> Any:
        if embedding and (a[1], b[0]) == weight:
            return "embedding"
        if len(a) > 2 and (b[0], *a[1:]) == weight and set(b[2:]) == {1}:
            return "conv"
        lies = {"linear": (b[0], *a[1:]), "transposed": (*a[1:], b[0])}
        fits = [form for form, shape in lies.items() if not embedding and shape == weight]
        if len(fits) == 2:  # square: the config must say
            return "transposed" if self.config.get("fan_in_fan_out") else "linear"
        if not fits:
            raise FamilyError(
                f"{self.label}: the factors of '{name}' have shapes {list(a)} and {list(b)}, which "
                f"don't make the base's weight {list(weight)}; an adapter of another base, or of a "
                "grouped convolution, which is not supported"
            )
        return fits[0]

    def _ia3(self, name: str, base: Checkpoint) -> Module:
        vector = self.tensors.specs[f"{name}.ia3_l"].shape
        shape = base.specs[f"{name}.weight"].shape
        inputs = _is_feedforward(self.config.get("feedforward_modules"), name)
        length = math.prod(vector)
        axes = [axis for axis in range(min(len(shape), 2)) if shape[axis] == length]
        if not axes:
            raise FamilyError(
                f"{self.label}: the vector of '{name}' has {length} entries, which is neither axis "
                f"of the base's weight {list(shape)}; an adapter of another base?"
            )
        if len(axes) > 1:  # square: the config must say
            transposed = len(shape) == 2 and bool(self.config.get("fan_in_fan_out"))
            axes = [int(inputs) ^ int(transposed)]
        axis = axes[0]
        return Ia3Module(name, axis, bias=not inputs and f"{name}.bias" in base)

    def _refuse_unknown(self) -> None:
        kind = self.config.get("peft_type")
        if kind not in _KINDS:
            raise CheckpointError(
                f"{self.label}: is an adapter of type {kind}, unknown here (known: "
                f"{', '.join(_KINDS)}); merge it into its base with PEFT and give the merged model"
            )
        used = [
            f"{key}: {value}" for key, value in self.config.items() if value and key not in _NEUTRAL
        ]
        start = str(self.config.get("init_lora_weights", "")).lower()
        if start.startswith(_CHANGED_BASE):
            used.append(f"init_lora_weights: {start} (changes the base)")
        if used:
            raise CheckpointError(
                f"{self.label}: uses what is not known here:{listing(used)}\n"
                "merge it into its base with PEFT and give the merged model"
            )

    def _refuse_tensors(self) -> None:
        strange = [
            f"'{name}'"
            for name in self.tensors
            if re.search(r"\.(lora_|ia3_|token_adapter)", name) and _adapted(name) is None
        ]
        if strange:
            raise CheckpointError(
                f"{self.label}: holds tensors of a kind that is not known here:{listing(strange)}\n"
                "merge it into its base with PEFT and give the merged model"
            )


def _plain(file: Checkpoint, label: str, files: tuple[Path, ...]) -> Checkpoint:
    """An adapter's tensors, without what PEFT wraps around the base's names."""
    names = {name.removeprefix(PREFIX).replace(".base_layer.", "."): name for name in file}
    # Of a resized embedding, PEFT saves what `modules_to_save` wraps, too, beside what counts.
    wrapped = {name for name in names if (bare := _WRAPPED.sub(".", name)) != name if bare in names}
    names = {name: there for name, there in names.items() if name not in wrapped}
    return View(file, names, label=label, files=files)


def _adapted(name: str) -> str | None:
    """The module that an adapter's tensor belongs to; None where it replaces one of the base's."""
    found = _ADAPTER_TENSOR.fullmatch(name)
    return found[1] if found else None


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """A module's setting, as PEFT looks it up: the first pattern that its name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _is_feedforward(patterns: str | list[str] | None, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name.endswith(pattern) for pattern in patterns or [])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not an object")  # noqa: TRY301
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
    return content
