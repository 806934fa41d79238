"""Adapters themselves as what is reused: their own tensors beside the base's.

The base gets the adapters' initial tensors, fine-tuned models are the adapters' files, and task
vectors, merges and codecs are what they always are. Only where weights are rebuilt do the
adapter's tensors fold into the base's, by the layout that is kept here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fusionkit.checkpoints.adapters.adapter import Adapter
from fusionkit.checkpoints.adapters.finding import as_adapter, factors_in, open_finetuned
from fusionkit.checkpoints.adapters.kinds import Ia3Module, LoraModule
from fusionkit.checkpoints.adapters.layout import AdapterLayout
from fusionkit.checkpoints.adapters.start import Seeded, Shapes, constant, start_of
from fusionkit.checkpoints.adapters.with_start import WithStart
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.errors import BundleError, FamilyError, listing

Adapters = Literal["merged", "modules"]
"""What is taken of PEFT adapters; see `Family`."""

_MEND = "use adapters: merged, which allows it"


@dataclass(frozen=True)
class AdapterSpace:
    """How adapters' own tensors make the base's weights.

    Attributes:
        layout: what they do to the base.
        start: how their initial tensors are known; see `start.start_of`.
        config: PEFT's config, of which an export is made.
        still: names of the tensors that never move: A, where a linearized LoRA starts at B = 0.
    """

    layout: AdapterLayout
    start: dict[str, Any]
    config: dict[str, Any]
    still: frozenset[str] = frozenset()

    @property
    def summary(self) -> str:
        """The space in a few words."""
        kind = ("linearized " if self.layout.linearized else "") + self.layout.kind
        start = ", ".join(f"{k} {v}" for k, v in self.start.items() if k in {"constant", "seed"})
        return f"{kind} on {len(self.layout.modules)} modules, start: {start or 'stored'}"

    @property
    def stored(self) -> bool:
        """Whether the initial tensors have to be kept, as nothing makes them again."""
        return "stored" in self.start

    def initial(self, shapes: Shapes, label: str) -> dict[str, Tensor]:
        """Make the initial tensors again, unless they are stored.

        Raises:
            BundleError: the installed PEFT draws others.
        """
        if "constant" in self.start:
            return constant(self.layout, shapes)[1]
        drawn = Seeded(**self.start).replay(self.layout, shapes)
        if drawn is None:
            raise BundleError(
                f"{label}: the installed PEFT draws other initial adapters from seed "
                f"{self.start['seed']} than those that it was made with; install PEFT "
                f"{self.config.get('peft_version', 'of that time')}"
            )
        return drawn

    def to_json(self) -> dict[str, Any]:
        """The space as JSON."""
        return {
            "layout": self.layout.to_json(),
            "start": self.start,
            "config": self.config,
            "still": sorted(self.still),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AdapterSpace":
        """Read what `to_json` wrote."""
        layout = AdapterLayout.from_json(content["layout"])
        still = frozenset(content["still"])
        return cls(layout, dict(content["start"]), dict(content["config"]), still)


def open_space(
    base: Checkpoint, finetuned: Mapping[str, Source | Checkpoint]
) -> tuple[Checkpoint, dict[str, Checkpoint], AdapterSpace]:
    """Open a base and adapters as a space of the adapters' own tensors.

    Returns:
        the base with the initial tensors, the adapters' tensors by task, and the space.

    Raises:
        FamilyError: a fine-tuned model is no adapter, or they differ in kind, modules, ranks,
            scaling or start.
    """
    folders: dict[str, Adapter] = {}
    for task, source in finetuned.items():
        opened = open_finetuned(source)
        if isinstance(opened, Checkpoint) and factors_in(opened, base):
            opened = as_adapter(opened, base)
        if not isinstance(opened, Adapter):
            raise FamilyError(
                f"{opened.label} (task '{task}'): no PEFT adapter, and adapters: modules is for "
                "adapters alone"
            )
        folders[task] = opened.named_for(base)
    first_task, first = next(iter(folders.items()))
    layout = first.layout(base)
    _refuse_more_than_products(layout, f"{first.label} (task '{first_task}')")
    record, start = start_of(first, layout)
    for task, folder in folders.items():
        where = f"{folder.label} (task '{task}')"
        if findings := _differences(layout, first, folder.layout(base), folder):
            raise FamilyError(
                f"{where}: differs from the adapter of '{first_task}':{listing(findings)}\n{_MEND}"
            )
        other_record, other = start_of(folder, layout)
        if other_record != record or any(not other[n].equal(t) for n, t in start.items()):
            raise FamilyError(
                f"{where}: started from another point than the adapter of '{first_task}', so that "
                f"their tensors have no common base; train both from one seed, or {_MEND}"
            )
    still = {
        module.tensors[0]
        for module in layout.modules
        if layout.linearized and not start[module.tensors[1]].any()
    }
    space = AdapterSpace(layout, record, first.config, frozenset(still))
    tensors: dict[str, Checkpoint] = {task: folder.tensors for task, folder in folders.items()}
    return WithStart(base, start), tensors, space


def _refuse_more_than_products(layout: AdapterLayout, where: str) -> None:
    """Refuse kinds whose tensors have no common start: they take part of it from the base."""
    odd = [
        f"'{module.name}': {type(module).__name__.removesuffix('Module')}"
        + (" of an attention" if isinstance(module, LoraModule) else "")
        for module in layout.modules
        if not isinstance(module, LoraModule | Ia3Module)
        or (isinstance(module, LoraModule) and module.form == "in_proj")
    ]
    if odd:
        raise FamilyError(
            f"{where}: adapters: modules takes plain LoRA and (IA)³ alone, not{listing(odd)}\n"
            f"{_MEND}"
        )


def _differences(
    layout: AdapterLayout, first: Adapter, other_layout: AdapterLayout, other: Adapter
) -> list[str]:
    if layout.kind != other_layout.kind:
        return [f"is of kind {other_layout.kind}, not {layout.kind}"]
    mine = {module.name: module for module in layout.modules}
    others = {module.name: module for module in other_layout.modules}
    findings = [f"adapts '{name}' too" for name in others if name not in mine]
    for name, module in mine.items():
        if name not in others:
            findings.append(f"does not adapt '{name}'")
            continue
        shapes = [
            (list(other.tensors.specs[t].shape), list(first.tensors.specs[t].shape))
            for t in module.tensors
            if t in other.tensors
        ]
        uneven = next(((theirs, ours) for theirs, ours in shapes if theirs != ours), None)
        if uneven:
            findings.append(f"'{name}' has a factor of shape {uneven[0]}, not {uneven[1]}")
        elif others[name] != module:
            findings.append(f"'{name}' is {others[name]}, not {module}")
    return findings
