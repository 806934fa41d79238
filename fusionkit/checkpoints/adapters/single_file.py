"""LoRAs in one file without a folder: diffusers' `pytorch_lora_weights.safetensors`, and kohya's.

Their scale is in the file: diffusers' JSON in the header, an `alpha` beside the factors, or none,
which stands for alpha = rank. kohya writes `_` for every `.` of a module's name, so that the base's
own names say which module is meant. A file may hold factors of several models of a pipeline
(`unet`, `text_encoder`): those are read that are the base's.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fusionkit.checkpoints.adapters.adapter import Adapter
from fusionkit.checkpoints.adapters.naming import PEFT, Part, is_peft, part_of
from fusionkit.checkpoints.adapters.refusals import method_of
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.json_text import parsed_json
from fusionkit.checkpoints.safetensors_file import read_metadata
from fusionkit.checkpoints.view import View
from fusionkit.errors import CheckpointError, FamilyError, listing

_METADATA = "lora_adapter_metadata"
_A, _B = "lora_A.weight", "lora_B.weight"
_TEXT = re.compile("(lora_te|text_encoder)")


@dataclass
class _Component:
    """The factors of one model of a pipeline.

    Attributes:
        tensors: module, as the file names it → what a tensor is to it → the tensor's name there.
        flat: the modules' names are kohya's.
        modules: module, as the file names it → as the base does; of those that it has.
        ambiguous: modules that several of the base's may be → those.
        uneven: modules whose factors don't make the base's weight.
    """

    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    flat: bool = False
    modules: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    uneven: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the base has all of the modules, in these shapes."""
        return len(self.modules) == len(self.tensors) and not self.uneven


class AdapterFile(Adapter):
    """A LoRA of one file, opened; `of` does so.

    Args:
        label: how messages call it.
        config: PEFT's config of it.
        tensors: its tensors, named as the base would name them.
        alphas: module, as the base names it → alpha, of those that say it.
        own_scale: the tensors alone say how it scales, not the config.
    """

    def __init__(
        self,
        label: str,
        config: Mapping[str, Any],
        tensors: Checkpoint,
        alphas: Mapping[str, float],
        own_scale: bool,
    ) -> None:
        super().__init__(label, config, tensors)
        self._alphas, self._own_scale = alphas, own_scale

    @classmethod
    def of(cls, file: Checkpoint, base: Checkpoint) -> Self | None:
        """Read a file of factors.

        Args:
            file: the tensors.
            base: the base.

        Returns:
            the adapter; None where the names are PEFT's, and nothing says how it scales.

        Raises:
            CheckpointError: it is of a method that is not read, or damaged.
            FamilyError: it is of another base, or it can't be told of which modules.
        """
        metadata = _metadata(file)
        if not metadata and any(is_peft(name) for name in file):
            return None
        components = _components(file, base)
        if not metadata and "" in components and _bare(components[""]):
            return None
        for component in components.values():
            _resolve(component, file, base)
        name = _chosen(components, file, base)
        chosen = components[name]
        names, alphas = {}, {}
        for module, tensors in chosen.tensors.items():
            own = chosen.modules[module]
            names.update({f"{own}.{leaf}": t for leaf, t in tensors.items() if leaf != "alpha"})
            if "alpha" in tensors:
                alphas[own] = float(file[tensors["alpha"]])
        config = _config_of(metadata, name)
        if config and alphas:
            raise CheckpointError(
                f"{file.label}: says its scale twice, by {_METADATA} in its header and by alpha "
                f"('{min(alphas)}'); save it again"
            )
        if not chosen.flat and alphas and len(alphas) < len(chosen.tensors):
            lacking = min(chosen.modules[m] for m, t in chosen.tensors.items() if "alpha" not in t)
            raise CheckpointError(
                f"{file.label}: has an alpha for '{min(alphas)}' and none for '{lacking}', so that "
                "its scale can't be told; save it again"
            )
        dora = any(name.endswith("magnitude_vector") for name in names)
        if unread := sorted(components.keys() - {name}):
            warnings.warn(
                f"{file.label}: holds factors of {', '.join(unread)} too, which are no part of "
                f"the base {base.label}; only those of {name} are read. Make a family of the "
                "other model's base, with this file, for those",
                stacklevel=2,
            )
        return cls(
            file.label,
            config or {"peft_type": "LORA", "use_dora": dora},
            View(file, names),
            alphas,
            own_scale=not config,
        )

    def scaling(self, name: str, rank: int) -> tuple[int, float]:
        """A module's rank and scale: by its own alpha, or the config in the file's header."""
        if not self._own_scale:
            return super().scaling(name, rank)
        return rank, self._alphas.get(name, rank) / rank

    def _form(
        self,
        name: str,
        a: tuple[int, ...],
        b: tuple[int, ...],
        weight: tuple[int, ...],
        embedding: bool,
    ) -> Any:
        # Never transposed; factors of a 1 × 1 convolution may be a linear layer's, or the reverse.
        return "linear" if len(weight) == 2 else "conv"


def _components(file: Checkpoint, base: Checkpoint) -> dict[str, _Component]:
    """The file's tensors, sorted by the models that they belong to.

    Raises:
        CheckpointError: some are of a method that is not read.
    """
    parts = {name: _part(name, base) for name in file}
    if unread := [name for name, part in parts.items() if part is None]:
        methods = sorted({method_of(name) for name in unread} - {"LoRA"})
        what = f" of {', '.join(methods)}" if methods else " that are no LoRA's"
        raise CheckpointError(
            f"{file.label}: is an adapter with tensors{what}, which is not read here:"
            f"{listing([repr(name) for name in unread], 4)}\nmerge it into its model with what "
            "made it, and give the merged model"
        )
    components: dict[str, _Component] = {}
    for name, part in parts.items():
        assert part is not None
        component = components.setdefault(part.component, _Component(flat=part.flat))
        tensors = component.tensors.setdefault(part.module, {})
        if part.leaf in tensors:
            raise CheckpointError(
                f"{file.label}: '{tensors[part.leaf]}' and '{name}' are both the {part.leaf} of "
                "one module; save it again"
            )
        tensors[part.leaf] = name
    for component in components.values():
        _check_whole(component, file)
    return components


def _part(name: str, base: Checkpoint) -> Part | None:
    part = part_of(name)
    if part is None or part.flat or part.component in {"", PEFT}:
        return part
    # Where the base's own names begin like that, it is no model of a pipeline.
    module = f"{part.component}.{part.module}"
    return part._replace(component="", module=module) if f"{module}.weight" in base else part


def _check_whole(component: _Component, file: Checkpoint) -> None:
    for module, tensors in component.tensors.items():
        lacking = next((leaf for leaf in (_A, _B) if leaf not in tensors), None)
        if lacking:
            raise CheckpointError(
                f"{file.label}: has '{next(iter(tensors.values()))}', but '{module}' lacks its "
                f"{lacking} (down is A, up is B); save it again"
            )
        a, b = (file.specs[tensors[leaf]].shape for leaf in (_A, _B))
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            raise CheckpointError(
                f"{file.label}: module '{module}' has factors of shapes {list(a)} and {list(b)}, "
                "which have no rank in common; save it again"
            )
        if "alpha" in tensors and file.specs[tensors["alpha"]].numel != 1:
            raise CheckpointError(f"{file.label}: '{tensors['alpha']}' is no single number")


def _bare(component: _Component) -> bool:
    """Whether factors are named as PEFT does in a folder, and no alpha says how they scale."""
    return any(
        "alpha" not in tensors and ".lora_A." in tensors[_A]
        for tensors in component.tensors.values()
    )


def _metadata(file: Checkpoint) -> dict[str, Any]:
    """What newer diffusers writes into the header: `{component}.{setting}` → value."""
    if len(file.files) != 1 or file.files[0].suffix != ".safetensors":
        return {}
    text = read_metadata(file.files[0]).get(_METADATA)
    try:
        content = parsed_json(text) if text else {}
    except ValueError as error:
        raise CheckpointError(
            f"{file.label}: {_METADATA} in its header is not readable as JSON ({error}); save it "
            "again"
        ) from error
    return content if isinstance(content, dict) else {}


def _config_of(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    """PEFT's config of one component; empty where the header has none."""
    prefix = f"{component}." if component else ""
    found = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    return {"peft_type": "LORA", **found} if "r" in found else {}


def _resolve(component: _Component, file: Checkpoint, base: Checkpoint) -> None:
    """Find the base's modules of these names."""
    own: dict[str, list[str]] = {}
    for known in base:
        module, _, leaf = known.rpartition(".")
        if leaf == "weight":
            own.setdefault(module.replace(".", "_") if component.flat else module, []).append(
                module
            )
    for module, tensors in component.tensors.items():
        found = own.get(module, [])
        if len(found) > 1:
            component.ambiguous[module] = found
        if len(found) != 1:
            continue
        component.modules[module] = found[0]
        weight = base.specs[f"{found[0]}.weight"].shape
        a, b = (file.specs[tensors[leaf]].shape for leaf in (_A, _B))
        if b[0] != weight[0] or math.prod(b[2:]) != 1 or not _even(a, weight):
            component.uneven.append(
                f"'{found[0]}': factors {list(a)} and {list(b)}, weight {list(weight)}"
            )


def _even(a: Iterable[int], weight: Iterable[int]) -> bool:
    """Whether A's other axes are the weight's, but for those of length 1 at the end."""
    ends = []
    for shape in (a, weight):
        other = list(shape)[1:]
        while len(other) > 1 and other[-1] == 1:
            other.pop()
        ends.append(other)
    return ends[0] == ends[1]


def _chosen(components: Mapping[str, _Component], file: Checkpoint, base: Checkpoint) -> str:
    """The component whose model the base is.

    Raises:
        FamilyError: it is none of them, or can be several.
    """
    fitting = [name for name, component in components.items() if component.fits]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise FamilyError(
            f"{file.label}: holds factors of {' and '.join(fitting)}, which all fit the base "
            f"{base.label}, so that it can't be told which are its; save those of one in a file "
            "of their own"
        )
    name, nearest = max(components.items(), key=lambda each: len(each[1].modules))
    which = f" of {name}" if name else ""
    held = f" (it holds factors of {', '.join(sorted(components))})" if len(components) > 1 else ""
    if nearest.ambiguous:
        doubtful = [f"'{m}': {' or '.join(found)}" for m, found in nearest.ambiguous.items()]
        raise FamilyError(
            f"{file.label}: is a LoRA{which}, whose names stand for several modules of the base "
            f"{base.label}:{listing(doubtful)}\n{_mend(name, base)}"
        )
    lacking = [f"'{module}'" for module in nearest.tensors if module not in nearest.modules]
    if lacking:
        raise FamilyError(
            f"{file.label}: is a LoRA{which}{held}, of modules that the base {base.label} has not "
            f"under these names:{listing(lacking)}\n{_mend(name, base)}"
        )
    raise FamilyError(
        f"{file.label}: is a LoRA{which}{held}, whose factors don't make the weights of the base "
        f"{base.label}:{listing(nearest.uneven)}\nan adapter of another base?"
    )


def _mend(component: str, base: Checkpoint) -> str:
    """What to do about names that are not the base's."""
    hint = f"an adapter of another base? the base's names begin like '{min(base)}'; "
    if _TEXT.match(component):
        return hint + "give the base's add_prefix or strip_prefix if only that differs"
    part = "transformer" if "transformer" in component else "unet"
    return hint + (
        "if it is one of this base, let diffusers give it the base's names: "
        f"pipe.load_lora_weights(FILE, adapter_name='default') and "
        f"pipe.{part}.save_lora_adapter(FOLDER), and give that folder"
    )
