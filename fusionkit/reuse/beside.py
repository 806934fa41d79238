"""What lies beside a task's weights, as transformers' own objects: tokenizer, processor, settings.

Each is the task's own where the bundle has one, and else the base's.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.config import GENERATION, config_of, fitted_config, said_in, write_json
from fusionkit.bundles.side_files import PROCESSOR, TOKENIZER, base_file, base_files, files_of
from fusionkit.checkpoints.architecture import is_transformers
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.from_config import CONFIG, built
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError
from fusionkit.registry import to_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_TASKS = (
    *("id2label", "label2id", "problem_type", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
)
"""Keys of a configuration that may differ among tasks of one class, sizes apart."""


def opened(bundle: str | Path | Bundle, base: Source | Checkpoint | None = None) -> Bundle:
    """A bundle, opened unless it is that already; with another place of its base, if one is given.

    Raises:
        BundleError: there is none.
    """
    if isinstance(bundle, Bundle):
        return bundle if base is None else Bundle(bundle.path, base, bundle.key or "")
    return Bundle.from_pretrained(bundle, base)


def made_by(path: Path, codec: DeltaCodec | None) -> Bundle:
    """A bundle's folder, opened.

    Raises:
        BundleError: there is none; or a codec is given, and it was made by another.
    """
    bundle = Bundle(path)
    if codec is not None and to_config(codec) != to_config(bundle.codec):
        raise BundleError(
            f"{path}: was made with {bundle.codec!r}, but `codec` is {codec!r}; compress "
            "again (--overwrite), or leave `codec` out"
        )
    return bundle


def tokenizer(
    bundle: str | Path | Bundle,
    task: str | None = None,
    *,
    base: Source | Checkpoint | None = None,
    **settings: Any,
) -> "PreTrainedTokenizerBase":
    """A task's tokenizer, with its chat template: the task's own where it has one, or the base's.

    Args:
        bundle: as of `fusionkit.load`.
        task: one of its tasks; None: the base.
        base: as of `fusionkit.load`.
        settings: given to `AutoTokenizer.from_pretrained`: `padding_side="left"`.

    Raises:
        BundleError: neither the task nor the base has a tokenizer, the bundle has no such task, or
            its base can't be found.
    """
    from transformers import AutoTokenizer

    return _made(AutoTokenizer, opened(bundle, base), task, "tokenizer", TOKENIZER, settings)


def same_tokenizer(bundle: Bundle, one: str | None, other: str | None) -> bool:
    """Whether two tasks (None: the base) have the same tokenizer: it may take seconds to make."""
    return tokenizer_digest(bundle, one) == tokenizer_digest(bundle, other)


def tokenizer_digest(bundle: Bundle, task: str | None) -> str:
    """What tells a task's tokenizer (None: the base's) from those of other tasks."""
    files = files_for(bundle, task)
    said = sha256()
    for name in sorted(name for name in files for each in TOKENIZER if fnmatchcase(name, each)):
        content = _bytes(files[name])
        said.update(f"{name}\0{len(content)}\0".encode() + content)
    return said.hexdigest()


def processor(
    bundle: str | Path | Bundle,
    task: str | None = None,
    *,
    base: Source | Checkpoint | None = None,
    **settings: Any,
) -> Any:
    """A task's image processor, feature extractor, or what joins one with a tokenizer.

    Args:
        bundle: as of `fusionkit.load`.
        task: one of its tasks; None: the base.
        base: as of `fusionkit.load`.
        settings: given to `AutoProcessor.from_pretrained`.

    Raises:
        BundleError: as of `tokenizer`.
    """
    from transformers import AutoProcessor

    patterns = (*PROCESSOR, *TOKENIZER)
    return _made(AutoProcessor, opened(bundle, base), task, "processor", patterns, settings)


def config_for(bundle: Bundle, task: str | None) -> dict[str, Any]:
    """The configuration of a task's class; None: of the base's.

    Raises:
        BundleError: none is known.
    """
    config = config_of(bundle, files_for(bundle, task))
    if config is None:
        raise BundleError(
            f"{bundle.path}: no {CONFIG} is known of its base ({bundle.base.label}), so that no "
            "model can be built; give the base's folder as `base` (--base), or build the model "
            "yourself and give it to fusionkit.switch"
        )
    return config


def tell(model: nn.Module, bundle: Bundle, task: str | None) -> None:
    """Tell a model of transformers what a task's configuration says: labels, tokens, generation.

    Args:
        model: with the task's weights.
        bundle: the bundle.
        task: one of its tasks; None: the base.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    files = files_for(bundle, task)
    config = config_of(bundle, files)
    if not is_transformers(inner) or config is None or "model_type" not in config:
        return
    known = built(config, str(bundle.path))
    if known is not None:
        live = Checkpoint.of(inner)
        apart = any(a in live and a not in live.aliases for a in known.tied)
        config = fitted_config(config, known, live, apart)
    with _of_library(f"{bundle.path}: the {CONFIG} of {_whose(task)}"):
        made = type(inner.config).from_dict(config)
    for key in _OF_TASKS:
        if hasattr(made, key) and getattr(inner.config, key, None) != getattr(made, key):
            setattr(inner.config, key, getattr(made, key))
    if isinstance(getattr(inner, "num_labels", None), int):
        inner.num_labels = made.num_labels
    if inner.can_generate():
        inner.generation_config = generation_config(files, inner.config, bundle)


def generation_config(files: Mapping[str, bytes | Path], config: Any, bundle: Bundle) -> Any:
    """What a task's `generation_config.json` says, or else its configuration.

    Args:
        files: those beside the task's weights.
        config: the task's, of transformers.
        bundle: the task's.

    Raises:
        BundleError: transformers can't read it.
    """
    from transformers import GenerationConfig

    if GENERATION not in files:
        return GenerationConfig.from_model_config(config)
    said = said_in(files, GENERATION, bundle)
    with _of_library(f"{bundle.path}: the {GENERATION} of a task, or of its base"):
        return GenerationConfig.from_dict(said)


def files_for(bundle: Bundle, task: str | None) -> Mapping[str, bytes | Path]:
    """The files beside a task's weights, or the base's (None)."""
    return base_files(bundle) if task is None else files_of(bundle, task)


@contextmanager
def _of_library(what: str) -> Iterator[None]:
    """A context in which a library makes something of a file, and raises what it likes."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise BundleError(
            f"{what} can't be used ({type(error).__name__}: {reason}); mend it"
        ) from error


def _whose(task: str | None) -> str:
    return "its base" if task is None else f"task '{task}'"


def _bytes(said: bytes | Path) -> bytes:
    return said if isinstance(said, bytes) else said.read_bytes()


def _made(
    kind: Any,
    bundle: Bundle,
    task: str | None,
    what: str,
    patterns: Collection[str],
    settings: dict[str, Any],
) -> Any:
    whose = f"{bundle.path}: {_whose(task)}"
    mend = (
        f"give a base that has one beside its weights (`base`, --base), or load the {what} yourself"
    )
    file = base_file(bundle)
    place: AbstractContextManager[dict[str, str]]
    if any(fnmatchcase(name, each) for name in files_for(bundle, task) for each in patterns):
        place = _folder(bundle, task)
    elif file is not None and file.suffix == ".gguf":
        found = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        place = nullcontext(found)
    else:  # some classes would come without a vocabulary then
        raise BundleError(f"{whose} has no {what}: none of {', '.join(patterns)}; {mend}")
    with place as told:
        try:
            made = kind.from_pretrained(**told, **settings)
        except Exception as error:  # what classes raise over their files is of any kind
            reason = str(error).partition("\n")[0][:200]
            raise BundleError(
                f"{whose} has no {what} that transformers can load ({reason}); {mend}"
            ) from error
    made.name_or_path = str(bundle.path)
    return made


@contextmanager
def _folder(bundle: Bundle, task: str | None) -> Iterator[dict[str, str]]:
    """A temporary folder with a task's files beside its weights."""
    files = files_for(bundle, task)
    with TemporaryDirectory(prefix="fusionkit-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(_bytes(content))
        if CONFIG not in files and (config := config_of(bundle, files)):
            write_json(Path(folder) / CONFIG, config)
        yield {"pretrained_model_name_or_path": folder}
