"""Which layer stands in for which of a model's modules, and what a bundle's tensors are there."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.live_model import is_sharded, on_meta
from fusionkit.checkpoints.names import unwrapped
from fusionkit.errors import BundleError, FusionKitError, WrongBaseError, listing
from fusionkit.reuse.mixed_layer import Layer, Leaf
from fusionkit.reuse.mixed_layers import (
    EmbeddingLayer,
    GroupLayer,
    LinearLayer,
    NormLayer,
    TransposedLayer,
)
from fusionkit.reuse.operands import Target
from fusionkit.reuse.scale_layer import ScaleLayer
from fusionkit.reuse.seen import Seen

_EXPERTS = re.compile(r"(^|\.)[^.]*experts?(\.|$)", re.IGNORECASE)
"""In modules' names: what is below is given the tokens that were sent there, in another order."""

_RELATIVE = re.compile(r"(^|[._])rel(ative)?_[^.]*$")


class Layout:
    """A model's modules, and the layers that stand in for them; made anew when the model changes.

    Args:
        model: the base model.
        bundle: whose tasks change it.

    Attributes:
        form: dtype and device of each of the model's tensors.

    Raises:
        FusionKitError: the model is sharded, compiled or on the meta device, or its rows are not
            the first axis within.
        BundleError: tasks change tensors that the model lacks.
    """

    def __init__(self, model: nn.Module, bundle: Bundle) -> None:
        _check(model)
        self._model, self._bundle = model, bundle
        self._private = frozenset(n for task in bundle.tasks for n in bundle.private(task))
        with torch.inference_mode(False), torch.no_grad():
            self._seen = Seen(model, bundle, self._private)
        self._modules = dict(model.named_modules())
        self._leaves = list(_leaves(self._modules))
        state = model.state_dict(keep_vars=True)
        self._state: dict[str, Tensor] = {
            name: state[there] for name, there in unwrapped(state).items()
        }
        self._places: dict[object, list[str]] = {}
        self._of: dict[str, Layer] = {}
        layers: dict[str, Layer] = {}
        for leaf in self._leaves:
            self._places.setdefault(_memory(leaf.tensor), []).append(leaf.full)
            path = self._reader(leaf)
            module = self._modules[path]
            if path not in layers:
                layers[path] = (_kind(module) if module is leaf.module else GroupLayer)(
                    module, path
                )
            layers[path].leaves.append(leaf)
            self._of[leaf.full] = layers[path]
        self._names: dict[str, list[str]] = {}
        self._classes: dict[str | None, tuple[object, int]] = {}
        self._head_of: tuple[int, str | None] = (-1, None)
        self.form = [(each.dtype, each.device) for each in self._state.values()]
        self._stamp = self._now()

    def is_current(self) -> bool:
        """Whether the model has the same tensors, where they were, and none was written to."""
        return self._stamp == self._now()

    def knows(self, task: str) -> bool:
        """Whether a task's own tensors were known when it was made."""
        return self._private.issuperset(self._bundle.private(task))

    def check_base(self) -> None:
        """Check that the model has the base's weights, rounded to its own dtype.

        Raises:
            WrongBaseError: it has not.
        """
        bundle, base, live = self._bundle, self._bundle.base, self._seen.tensors
        wrong = [
            f"'{name}'"
            for name in bundle.roles
            if name in live and name in base and not _same(live[name].detach(), base[name])
        ]
        if wrong:
            raise WrongBaseError(
                f"{bundle.label}: a batch of many tasks needs the base in the model, whose weights "
                f"are others:{listing(wrong)}\nmake it the base first (ReuseModule.switch(None), "
                "fusionkit.load(bundle), or fusionkit.switch(model, bundle, None))"
            )

    def names(self, name: str) -> list[str]:
        """The model's own names of what the bundle calls by one.

        Raises:
            BundleError: the model has no such tensor.
        """
        if name not in self._names:
            places = [n for n in self._seen.places({name: None}) if n in self._state]
            if not places:
                raise BundleError(
                    f"{self._bundle.label}: tasks change '{name}', which has no place in "
                    f"{type(self._model).__name__}; build the model with a tensor of that name (a "
                    "buffer must be persistent), or put it into `ignore` if no one needs it"
                )
            all_names = (each for n in places for each in self._places[_memory(self._state[n])])
            self._names[name] = list(dict.fromkeys(all_names))
        return self._names[name]

    def layer(self, name: str) -> Layer:
        """The layer that has one of the model's tensors, by the model's own name."""
        return self._of[name]

    def target(self, name: str) -> Target:
        """What the model has of a bundle's tensor.

        Raises:
            BundleError: nothing.
        """
        self.names(name)
        tensor = self._tensor(name)
        return Target(tensor.dtype, tensor.device)

    def classes(self, task: str | None) -> int | None:
        """How many rows the model's last matrix has for a task, if tasks have it to themselves."""
        bundle, head = self._bundle, self._head()
        if head is None:
            return None
        if task is not None and head in bundle.private(task):
            record = bundle.manifest.tasks[task]
            if self._classes.get(task, (None, 0))[0] is not record:
                self._classes[task] = record, len(bundle.private_tensor(task, head))
            return self._classes[task][1]
        return len(self._tensor(head)) + (0 if task is None else bundle.added(task).get(head, 0))

    def _head(self) -> str | None:
        """The bundle's name of the model's last matrix, if tasks have rows of it to themselves."""
        bundle = self._bundle
        if self._head_of[0] != bundle.version:
            last = next((leaf for leaf in reversed(self._leaves) if leaf.tensor.ndim > 1), None)
            added = (name for task in bundle.tasks for name in bundle.added(task))
            own = dict.fromkeys([*self._private, *added])
            found = next((n for n in own if last and last.full in self.names(n)), None)
            self._head_of = bundle.version, found
        return self._head_of[1]

    def _tensor(self, name: str) -> Tensor:
        """The model's own tensor, by the bundle's name."""
        return self._state[self._seen.live_name(name)]

    def _now(self) -> list[tuple[int, int]]:
        """Where the model's tensors are, and how often each was written to."""
        now = []
        for leaf in self._leaves:
            tensor = leaf.now()
            written = 0 if tensor.is_inference() else tensor._version
            now.append((tensor.data_ptr(), written))
        return now

    def _reader(self, leaf: Leaf) -> str:
        """The name of the smallest module that reads a tensor, and is given rows in their order."""
        path = leaf.path
        if at := _EXPERTS.search(path):  # of a stack, the module has the tokens in their order
            path = path if leaf.tensor.ndim == 3 else path[: at.start()]
        if _RELATIVE.search(path):  # tables that are read by distances, without any rows
            path = path.rpartition(".")[0]
        for end in _ends(path):
            module = self._modules[path[:end]]
            if isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations"):
                return path[:end]
        return path


def _leaves(modules: Mapping[str, nn.Module]) -> Iterator[Leaf]:
    for path, module in modules.items():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield Leaf(module, path, name, tensor)


def _memory(tensor: Tensor) -> object:
    """Equal of tensors that are one."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _same(live: Tensor, base: Tensor) -> bool:
    return live.shape == base.shape and torch.equal(live, base.to(live.device, live.dtype))


def _check(model: nn.Module) -> None:
    if is_sharded(model):
        raise FusionKitError(
            "the model is sharded; a batch of many tasks needs one that is whole in one process: "
            "switch it by `fusionkit.ReuseModule`, on all ranks together"
        )
    if on_meta(model):
        raise FusionKitError("the model is on the meta device; load its weights first")
    for path, module in model.named_modules():
        name = f"'{path}' ({type(module).__name__})" if path else type(module).__name__
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise FusionKitError(
                f"{name} is compiled; a batch of many tasks needs the model as it was before "
                "torch.compile"
            )
        if getattr(module, "batch_first", True) is False:
            raise FusionKitError(
                f"{name} has batch_first=False: the rows are not its first axis, which a batch of "
                "many tasks needs; build it with batch_first=True"
            )


def _kind(module: nn.Module) -> type[Layer]:
    forward = type(module).forward
    if "forward" in module.__dict__ or hasattr(module, "parametrizations"):
        return GroupLayer
    if forward is nn.Linear.forward:
        return LinearLayer
    if forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None:
        return EmbeddingLayer
    if forward is nn.LayerNorm.forward:
        return NormLayer
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return TransposedLayer
    return ScaleLayer if ScaleLayer.fits(module) else GroupLayer


def _ends(path: str) -> Iterator[int]:
    yield 0
    yield from (at.start() for at in re.finditer(r"\.", path))
    yield len(path)
