"""Whether what is given is a model or an adapter, by its files and its tensors' names.

An adapter's tensors are never a model's: given as one, they are read for what they are, or refused
by name. As tensors that the base lacks, they would be kept beside it, and change nothing.
"""

from pathlib import Path

from fusionkit.checkpoints.adapters.adapter import CONFIG, Adapter
from fusionkit.checkpoints.adapters.folder import AdapterFolder, folder_of
from fusionkit.checkpoints.adapters.naming import is_factor, is_live, is_peft
from fusionkit.checkpoints.adapters.refusals import method_of
from fusionkit.checkpoints.adapters.single_file import AdapterFile
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import CheckpointError

_LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_LIVE_MEND = (
    "give the folder that its save_pretrained(…) writes, or the model after merge_and_unload()"
)


def open_base(source: Source) -> Checkpoint:
    """Open a base.

    Args:
        source: anything that `Checkpoint.of` reads.

    Raises:
        CheckpointError: it can't be read, or it is an adapter, or a model with one in it.
    """
    base = Checkpoint.of(source)
    factors = [name for name in base if is_factor(name)]
    if not factors:
        return base
    if any(is_live(name) and (is_peft(name) or ".default" in name) for name in factors):
        raise CheckpointError(
            f"{base.label}: is a live PEFT model, with '{factors[0]}' beside the weights that it "
            "changes, and no base; give the base itself, as it was before the adapter was put "
            "into it (model.unload())"
        )
    if is_peft(factors[0]) or len(factors) > len(base) // 2:
        raise CheckpointError(
            f"{base.label}: is {_named(factors)}, and no base: it holds '{factors[0]}'; give the "
            "model that it was trained on as the base, and this among the fine-tuned ones"
        )
    return base  # its own class has such tensors


def open_finetuned(source: Source) -> Checkpoint | Adapter:
    """Open a fine-tuned model, or an adapter's folder; of what kind a file is, its names say.

    Args:
        source: anything that `Checkpoint.of` reads, or an adapter: a folder of PEFT's, the file of
            tensors in it, or a file of diffusers' or kohya's, which says all by itself.

    Raises:
        CheckpointError: it can't be read, or is an adapter of a kind that is not read.
    """
    if isinstance(source, str | Path):
        if found := folder_of(source):
            return AdapterFolder(*found)
        source = _file_of_folder(source)
    return Checkpoint.of(source)


def factors_in(opened: Checkpoint, base: Checkpoint) -> list[str]:
    """Names of a fine-tuned model's tensors that are an adapter's: there, it is no model."""
    return [name for name in opened if name not in base and is_factor(name)]


def as_adapter(opened: Checkpoint, base: Checkpoint) -> Adapter:
    """Take a checkpoint with an adapter's tensors (`factors_in`) for what it is.

    Args:
        opened: the checkpoint.
        base: the base.

    Raises:
        CheckpointError: it is a model with an adapter in it, or an adapter that is not read, or
            lacks its scale.
        FamilyError: it is an adapter of another base.
    """
    factors = factors_in(opened, base)
    first = f"'{factors[0]}'"
    if any(is_live(name) for name in factors):
        raise CheckpointError(
            f"{opened.label}: is a live PEFT model, with {first} beside the weights that it "
            f"changes; {_LIVE_MEND}"
        )
    if any(name in base for name in opened):
        raise CheckpointError(
            f"{opened.label}: holds {first} of {_named(factors)} beside the base's own weights, "
            "which they would have to be merged into; merge them with what trained them, or give "
            "the adapter alone"
        )
    adapter = AdapterFile.of(opened, base)
    if adapter is None:
        raise CheckpointError(
            f"{opened.label}: is a PEFT {method_of(factors[0])} ({first}), without the {CONFIG} "
            f"that says its scale; give the folder that holds both, as PEFT's save_pretrained(…) "
            "writes it"
        )
    return adapter


def _file_of_folder(source: str | Path) -> str | Path:
    """A folder that holds diffusers' LoRA and nothing else to read stands for the file in it."""
    folder = open_path(str(source))
    for name in _LORA_FILES:
        if (folder / name).is_file():
            others = [each for each in folder.iterdir() if each.suffix in {".safetensors", ".bin"}]
            if len(others) == 1:
                return f"{str(source).rstrip('/')}/{name}"
    return source


def _named(factors: list[str]) -> str:
    method = method_of(factors[0])
    return f"{'an' if method[0] in '(O' else 'a'} {method} adapter"
