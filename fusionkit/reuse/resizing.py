"""A live model's tensors in other shapes, in place: a task's own head, an extended vocabulary."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusionkit.checkpoints.architecture import is_transformers
from fusionkit.checkpoints.in_memory import owner_of
from fusionkit.checkpoints.names import unwrapped
from fusionkit.checkpoints.vocabulary import common, rows_in
from fusionkit.errors import BundleError


def resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give tensors of a vocabulary other numbers of rows; the rows that stay keep their values.

    Tensors that share one still do. The modules that hold them, and transformers' configurations,
    know their new sizes, as after `resize_token_embeddings`.

    Args:
        model: the model.
        shapes: name of a tensor, as `state_of` has it → its new shape.

    Raises:
        BundleError: one is sharded.
    """
    if not shapes:
        return
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, there in unwrapped(state).items():
        names.setdefault(id(state[there]), []).append(name)
    for name, shape in shapes.items():
        module, leaf = owner_of(model, name)
        old: Tensor = getattr(module, leaf)
        if tuple(old.shape) == shape:  # or shared with one that was resized before
            continue
        if isinstance(old, DTensor):
            raise BundleError(
                f"the task has {rows_in(shape)} rows of '{name}' where the model, which is "
                f"sharded, has {rows_in(old.shape)}; leave the model unsharded"
            )
        fresh = old.detach().new_zeros(shape)
        fewer = min(shape, tuple(old.shape))
        common(fresh, fewer).copy_(common(old.detach(), fewer))
        put_anew(model, names[id(old)], fresh)


def put_anew(model: nn.Module, names: list[str], value: Tensor) -> None:
    """Put a tensor of another shape in a place, or in all places that share one.

    Args:
        model: the model.
        names: of the places, as `state_of` has them.
        value: the tensor, on its device; the model's own from here on.
    """
    module, leaf = owner_of(model, names[0])
    old = module._parameters.get(leaf)
    fresh = value if old is None else nn.Parameter(value, requires_grad=old.requires_grad)
    for name in names:
        module, leaf = owner_of(model, name)
        setattr(module, leaf, fresh)
        if leaf != "weight":
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = fresh.shape
        if isinstance(module, nn.Embedding):
            before = module.num_embeddings
            module.num_embeddings, module.embedding_dim = fresh.shape
            _tell(model, module, before)


def _tell(model: nn.Module, embedding: nn.Embedding, before: int) -> None:
    """Tell transformers' models of the size that their embedding now has."""
    for each in model.modules():
        if not is_transformers(each) or _input_of(each) is not embedding:
            continue
        try:
            config = each.config.get_text_config()  # type: ignore[union-attr, operator]
        except ValueError:  # it has several
            config = each.config
        for owner in (config, each):
            if getattr(owner, "vocab_size", None) == before:
                owner.vocab_size = embedding.num_embeddings


def _input_of(model: nn.Module) -> object:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None  # of classes without any
