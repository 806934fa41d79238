"""Models too large for one device, sharded over several processes: FSDP2, tensors are `DTensor`s.

Each rank keeps its part of the model, and of the base's weights beside it. A task's tensors are
rebuilt whole, one at a time, on every rank, which keeps its part of each. Reading a tensor of the
base gathers it from all ranks: they switch together, to the same task.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fusionkit.checkpoints.checkpoint import Checkpoint, matches
from fusionkit.checkpoints.in_memory import specs_of
from fusionkit.checkpoints.live_model import aliases, is_sharded, on_meta, part, put
from fusionkit.errors import FusionKitError
from fusionkit.task_vectors.task_source import TaskSource
from fusionkit.tasks.spread import TasksSpread


@contextmanager
def whole(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Tensors to write into, all of them whole.

    Args:
        tensors: by name; of what is written into a sharded one, this rank keeps its part as soon
            as the next tensor is asked for.
    """
    targets = _Whole(tensors)
    yield targets
    targets.finish()


class _Whole(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._pending: tuple[DTensor, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        self.finish()
        target = self._tensors[name]
        if not isinstance(target, DTensor):
            return target
        blank = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        self._pending = target, blank
        return blank

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def finish(self) -> None:
        """Keep this rank's part of the tensor asked for last."""
        if self._pending is not None:
            target, value = self._pending
            if value._version:  # else it was looked at, for its device, and not written
                put(target, value)
        self._pending = None


class ShardedBase(Checkpoint):
    """A base of which every rank keeps a part; to read a tensor gathers it, on all ranks at once.

    Args:
        shards: name → what this rank keeps of it; tied names share one.
        label: how messages call it.
        aliases: tied name → name of the tensor that it shares.
        buffers: names of the model's buffers.

    Attributes:
        shards: see above.
    """

    serial = True

    def __init__(
        self,
        shards: Mapping[str, Tensor],
        label: str,
        aliases: Mapping[str, str],
        buffers: frozenset[str],
    ) -> None:
        self.shards, self.label, self.buffers = shards, label, buffers
        self.aliases = dict(aliases)  # the class's own can't be pickled
        self.specs = specs_of(shards)
        self.nbytes = sum(spec.nbytes for name, spec in self.specs.items() if name not in aliases)

    @classmethod
    def beside(cls, model: nn.Module, base: Checkpoint | None = None) -> "ShardedBase":
        """Keep this rank's part of a base's weights.

        Args:
            model: a sharded model; it has the base's weights, unless they are given.
            base: the weights of the model as it was before, in their own dtype.
        """
        state = model.state_dict()
        tied = aliases(model) if base is None else base.aliases
        source = state if base is None else base
        # Cloned, since a part may be a view, which keeps the whole.
        own = {n: part(source[n], t).clone() for n, t in state.items() if n not in tied}
        buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        label = f"{type(model).__name__} (sharded in memory)" if base is None else base.label
        shards = {name: own[tied.get(name, name)] for name in state}
        return cls(shards, label, tied, buffers & state.keys())

    def __getitem__(self, name: str) -> Tensor:
        """Gather one tensor, in its own dtype."""
        if name not in self.shards:
            raise KeyError(f"{self.label}: no tensor '{name}'")
        shard = self.shards[name]
        return shard.full_tensor() if isinstance(shard, DTensor) else shard

    def in_memory(self, device: torch.device | None = None) -> Checkpoint:
        """A copy of this rank's parts; see `Checkpoint.in_memory`."""
        own = {
            name: shard.to(device, copy=True)
            for name, shard in self.shards.items()
            if name not in self.aliases
        }
        shards = {name: own[self.aliases.get(name, name)] for name in self}
        return ShardedBase(shards, self.label, self.aliases, self.buffers)


def beside(model: nn.Module) -> Checkpoint:
    """A copy of a model's weights, to be kept beside it: sharded where the model is."""
    return ShardedBase.beside(model) if is_sharded(model) else Checkpoint.of(model).in_memory()


def kept(base: Checkpoint) -> Mapping[str, Tensor]:
    """A base's tensors as this rank keeps them, in parts or whole: nothing is gathered."""
    return base.shards if isinstance(base, ShardedBase) else base


def kept_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on the rank that keeps the most of it; all ranks get the same number."""
    shape = list(tensor.shape)
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            if placement.is_shard():
                shape[placement.dim] = -(-shape[placement.dim] // size)  # type: ignore[attr-defined]
    return torch.Size(shape).numel() * tensor.dtype.itemsize


def shard(
    model: nn.Module, mesh: DeviceMesh, own: Collection[str], base: Checkpoint | None = None
) -> None:
    """Shard a model in place by `fully_shard`: block by block, then the rest of it.

    A block is an element of one of the model's outermost `ModuleList`s and `Sequential`s, and is
    whole on each device while it runs. The parameters need no gradient any more: FSDP would refuse
    a block of several dtypes.

    Args:
        model: with its weights; or on the meta device, where each block is filled just before it
            is sharded.
        mesh: of one dimension, the ranks to shard over.
        own: names of the tasks' own tensors; they stay whole on every rank, since their shape may
            change.
        base: has the weights of a model on the meta device, all but the tasks' own; those are
            zero until a task brings its.

    Raises:
        FusionKitError: the model was sharded on the meta device, or has a buffer there that is no
            part of a checkpoint.
    """
    if is_sharded(model):
        raise FusionKitError(
            "the model was sharded on the meta device, where it has no weights; fill it first, or "
            "leave it unsharded: ReuseModule fills each block as it shards it"
        )
    model.requires_grad_(False)
    tied = aliases(model)
    for block in (*_blocks(model, tied), model):
        if base is not None:
            _fill(model, block, own, base, tied)
        parameters = model.named_parameters(remove_duplicate=False)
        # FSDP refuses scalars.
        ignored = {tensor for name, tensor in parameters if name in own or not tensor.ndim}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    sharded = (tensor for tensor in model.parameters() if isinstance(tensor, DTensor))
    if (first := next(sharded, None)) is not None:
        model.to(first.device)  # FSDP moves what it shards, and leaves the rest where it is


def shard_with_base(
    model: nn.Module,
    base: Checkpoint,
    mesh: DeviceMesh,
    own: Collection[str],
    source: Checkpoint | None,
) -> ShardedBase:
    """Shard a model by `shard`, unless it is sharded already, and the base's weights beside it.

    Args:
        model: has the base's weights, or is on the meta device.
        base: the base's weights as they were kept beside the model until now.
        mesh: of one dimension, the ranks to shard over.
        own: names of the tasks' own tensors; they stay whole.
        source: has the weights of a model on the meta device.

    Returns:
        the base's weights, to be kept beside the model from now on.

    Raises:
        FusionKitError: as for `shard`.
    """
    empty = on_meta(model)
    if empty or not is_sharded(model):
        shard(model, mesh, own, source if empty else None)
    return ShardedBase.beside(model, None if empty else base)


def check_strategy(trainer: Trainer, model: nn.Module) -> None:
    """Check, before anything runs, that a Trainer can run the model where it is to be sharded.

    Raises:
        FusionKitError: it can't; the message says what to change.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise FusionKitError(
            "FSDPStrategy joins a model's tensors into flat ones, in which no task's have a place; "
            "use ModelParallelStrategy, with data_parallel_size: (all devices) and "
            "tensor_parallel_size: 1"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        if on_meta(model):
            raise FusionKitError(
                "the model is on the meta device, and only with ModelParallelStrategy is it filled "
                "from `base`; use that, or build the model on a device"
            )
        return
    if trainer.training:
        raise FusionKitError(
            "a sharded model can be switched and evaluated, but not calibrated; calibrate where "
            "one device holds the whole model"
        )
    if isinstance(getattr(trainer, "datamodule", None), TasksSpread):
        raise FusionKitError(
            "the ranks of a sharded model switch together, so none can have tasks of its own; use "
            "--spread rows"
        )
    if strategy.device_mesh["tensor_parallel"].size() > 1 and not is_sharded(model):
        raise FusionKitError(
            "tensor_parallel_size is more than 1, and how to split a layer is not known here; set "
            "data_parallel_size: (all devices) and tensor_parallel_size: 1, or split the model "
            "yourself before it is given to ReuseModule"
        )


def _blocks(model: nn.Module, tied: Mapping[str, str]) -> list[nn.Module]:
    """The modules to be sharded one by one; not those that share a tensor with the outside.

    FSDP knows of no sharing between modules that it shards separately.
    """
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():  # the outer ones first
        parent = model.get_submodule(path.rpartition(".")[0])
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if path and isinstance(parent, nn.ModuleList | nn.Sequential) and not inside:
            blocks[path] = module
    return [
        module
        for path, module in blocks.items()
        if all(a.startswith(f"{path}.") == b.startswith(f"{path}.") for a, b in tied.items())
    ]


def _fill(
    model: nn.Module,
    block: nn.Module,
    own: Collection[str],
    base: Checkpoint,
    tied: Mapping[str, str],
) -> None:
    """Give what is on the meta device in one block of a model its values, on the CPU."""
    inside, saved = set(block.modules()), model.state_dict().keys()
    filled: dict[str, Tensor] = {}  # by first name, so that tied ones stay one tensor
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers) if module in inside else ():
            for leaf, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                name = f"{path}.{leaf}" if path else leaf
                if name not in saved:
                    raise FusionKitError(
                        f"the buffer '{name}' of {type(model).__name__} is on the meta device, and "
                        "no checkpoint holds it; build the model with its buffers, as "
                        "accelerate.init_empty_weights() does"
                    )
                first = tied.get(name, name)
                if first not in filled:
                    names = [first, *(alias for alias, to in tied.items() if to == first)]
                    value = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    if name not in own:
                        value.copy_(base[next(name for name in names if name in base)])
                    parameter = isinstance(tensor, nn.Parameter)
                    filled[first] = nn.Parameter(value, False) if parameter else value
                tensors[leaf] = filled[first]


def own_tensors(model: nn.Module, private: Sequence[str], source: TaskSource | None) -> set[str]:
    """Names of the tensors that are a task's own.

    Args:
        model: the model.
        private: patterns of them.
        source: the tasks, if they are known.
    """
    own = {name for name in model.state_dict() if matches(name, private)}
    if source is not None:
        own.update(name for task in source.tasks for name, _ in source.private_tensors(task))
    return own
