"""Base models by config, for recipes, where `class_path` may name a function.

timm needs no help from here: `timm.create_model` and its classes are class paths as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.checkpoints.hub_places import model_place
from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import CheckpointError, DataError, FusionKitError

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How transformers calls the classes of models that generate."""


@reads_hub(path=Use.MODEL)
def sequence_classifier(path: str, num_labels: int = 2, pretrained: bool = True) -> nn.Module:
    """A Hugging Face model with a sequence classification head.

    Args:
        path: a local folder, a hub name, or `package:NAME/FOLDER` of an installed package.
        num_labels: rows of the head; a task's own head replaces it, whatever its size.
        pretrained: load the weights; otherwise the architecture alone is built.

    Returns:
        the model, in eval mode; it returns an object with `logits` `(B, num_labels)`.

    Raises:
        FusionKitError: transformers, or the package that `path` names, is not installed.
        CheckpointError: there is no such model.
    """
    return padded(_built("SequenceClassification", path, pretrained, num_labels=num_labels))


def padded(model: nn.Module) -> nn.Module:
    """A classifier that knows what fills rows up, where its configuration does not say it.

    It looks for a row's last token before what fills it up: GPT-2, Llama.

    Args:
        model: changed in place, if it is of transformers; `TextData` fills rows up by the same.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "pad_token_id", 0) is None:
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end[0] if isinstance(end, list) else end
    return model


@reads_hub(path=Use.MODEL)
def causal_lm(
    path: str,
    pretrained: bool = True,
    dtype: str = "auto",
    attention: str | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A Hugging Face language model that writes on what it has read (Llama, GPT-2, Qwen, …).

    Args:
        path: a local folder, a `.gguf` file, a hub name, or `package:NAME/FOLDER` of an installed
            package.
        pretrained: load the weights; otherwise the architecture alone is built.
        dtype: of the weights: `float32`, `bfloat16`, …; `auto`: as they are stored.
        attention: transformers' `attn_implementation`: `sdpa`, `eager`, `flash_attention_2`, …
        gradient_checkpointing: transformers' own: where it is trained, each layer is computed again
            on the way back, rather than kept.

    Returns:
        the model, in eval mode; it returns an object with `logits` `(B, L, vocabulary)`.

    Raises:
        FusionKitError: transformers, gguf, or the package that `path` names, is not installed.
        CheckpointError: there is no such model, or it is an encoder, or an encoder-decoder; or
            transformers can't checkpoint it.
    """
    config = _config(path)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{path}: {config.model_type} is an encoder-decoder, and no causal language model; "
            "build it by fusionkit.tasks.models.seq2seq_lm"
        )
    model = _built("CausalLM", path, pretrained, dtype=dtype, attn_implementation=attention)
    return _checkpointed(model, path) if gradient_checkpointing else model


@reads_hub(path=Use.MODEL)
def seq2seq_lm(
    path: str,
    pretrained: bool = True,
    dtype: str = "auto",
    attention: str | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A Hugging Face language model whose decoder answers what its encoder has read (T5, BART, …).

    Args:
        path: as of `causal_lm`.
        pretrained: load the weights; otherwise the architecture alone is built.
        dtype: as of `causal_lm`.
        attention: as of `causal_lm`.
        gradient_checkpointing: as of `causal_lm`.

    Returns:
        the model, in eval mode; it returns an object with `logits` `(B, T, vocabulary)`.

    Raises:
        FusionKitError: transformers, gguf, or the package that `path` names, is not installed.
        CheckpointError: there is no such model, or it is no encoder-decoder; or transformers can't
            checkpoint it.
    """
    config = _config(path)
    if not getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{path}: {config.model_type} is no encoder-decoder; build it by "
            "fusionkit.tasks.models.causal_lm"
        )
    model = _built("Seq2SeqLM", path, pretrained, dtype=dtype, attn_implementation=attention)
    return _checkpointed(model, path) if gradient_checkpointing else model


@reads_hub(path=Use.MODEL)
def image_text_lm(
    path: str, pretrained: bool = True, dtype: str = "auto", attention: str | None = None
) -> nn.Module:
    """A Hugging Face model that writes about images (SmolVLM, LLaVA, Qwen2-VL, PaliGemma, …).

    Args:
        path: as of `causal_lm`.
        pretrained: load the weights; otherwise the architecture alone is built.
        dtype: as of `causal_lm`.
        attention: as of `causal_lm`.

    Returns:
        the model, in eval mode; it returns an object with `logits` `(B, L, vocabulary)`.

    Raises:
        FusionKitError: transformers, or the package that `path` names, is not installed.
        CheckpointError: there is no such model.
    """
    return _built("ImageTextToText", path, pretrained, dtype=dtype, attn_implementation=attention)


@reads_hub(path=Use.MODEL)
def image_classifier(path: str, pretrained: bool = True) -> nn.Module:
    """A Hugging Face model that classifies images (ViT, ConvNeXt, ResNet, …).

    Args:
        path: as of `sequence_classifier`.
        pretrained: load the weights; otherwise the architecture alone is built.

    Returns:
        the model, in eval mode, with the head that is stored; a task's own head replaces it,
        whatever its size. It returns an object with `logits` `(B, classes)`.

    Raises:
        FusionKitError: as of `sequence_classifier`.
        CheckpointError: there is no such model.
    """
    return _built("ImageClassification", path, pretrained)


@reads_hub(path=Use.BESIDE)
def processor_of(path: str) -> Any:
    """A Hugging Face processor of texts and images, with a tokenizer.

    Args:
        path: a local folder, a hub name, or `package:NAME/FOLDER` of an installed package.

    Raises:
        FusionKitError: transformers, or the package that `path` names, is not installed.
        DataError: there is none.
    """
    transformers = _transformers("a processor")
    place, _ = _place(path)
    try:
        with quiet():
            found = transformers.AutoProcessor.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: no processor there; expected a folder with processor_config.json and a "
            f"tokenizer, as `save_pretrained` of a processor writes it, or a hub name "
            f"({_said(error)})"
        ) from error
    if not hasattr(found, "tokenizer") or not hasattr(found, "image_processor"):
        raise DataError(
            f"{path}: is {type(found).__name__}, which makes nothing of images and texts "
            "together; give the folder of a vision-language model"
        )
    return found


@reads_hub(path=Use.BESIDE)
def tokenizer_of(path: str) -> Any:
    """A Hugging Face tokenizer.

    Args:
        path: a local folder, a `.gguf` file, a hub name, or `package:NAME/FOLDER` of an installed
            package.

    Raises:
        FusionKitError: transformers, or the package that `path` names, is not installed.
        DataError: there is none.
    """
    transformers = _transformers("a tokenizer")
    place, file = _place(path)
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(place, **file)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: no tokenizer there; expected a folder with tokenizer.json or the like, as "
            f"`save_pretrained` of a tokenizer writes it, or a hub name ({_said(error)})"
        ) from error


def config_of(model: str | Path | None) -> Any:
    """The configuration of a model of transformers; None where there is none to be had."""
    try:
        return None if model is None else _read_config(str(model))
    except FusionKitError:
        return None


def _config(path: str) -> Any:
    """A model's configuration, of a language model that generates.

    Raises:
        FusionKitError: transformers is not installed.
        CheckpointError: there is none, or it is an encoder's.
    """
    config = _read_config(path)
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    generates = any(name.endswith(LANGUAGE_MODELS) for name in config.architectures or [])
    encoder = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if encoder and not generates and not getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{path}: {config.model_type} is an encoder, which writes no text; give a causal or an "
            "encoder-decoder language model, or use it by "
            "fusionkit.tasks.models.sequence_classifier"
        )
    return config


def _read_config(path: str) -> Any:
    transformers = _transformers("a language model")
    place, file = _place(path)
    with _named(path), quiet():
        return transformers.AutoConfig.from_pretrained(place, **file)


def _built(head: str, path: str, pretrained: bool, **settings: Any) -> nn.Module:
    """A model of transformers' `AutoModelFor…`, in eval mode."""
    transformers = _transformers("a Hugging Face model")
    model_class: Any = getattr(transformers, f"AutoModelFor{head}")
    given = {name: value for name, value in settings.items() if value is not None}
    place, file = _place(path)
    with _named(path), quiet():
        if pretrained:
            if file and hasattr(transformers, "GgufConfig"):  # where blocks may stay as they are
                given["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model = model_class.from_pretrained(place, **file, **given)
            if file and getattr(model, "hf_quantizer", None):
                model.hf_quantizer.remove_quantization_config(model)  # or it can't be saved
        else:
            own = {name: given.pop(name) for name in ("num_labels",) if name in given}
            config = transformers.AutoConfig.from_pretrained(place, **file, **own)
            if given.get("dtype") == "auto":
                given["dtype"] = config.dtype
            model = model_class.from_config(config, **given)
    return cast(nn.Module, model).eval()


def _checkpointed(model: Any, path: str) -> nn.Module:
    """A model of transformers whose layers are computed again on the way back."""
    # As transformers calls it from 5.24 on, and before.
    own = getattr(model, "activation_checkpointing_enable", None)
    try:
        if own is None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            own({"use_reentrant": False})
    except ValueError as error:
        raise CheckpointError(
            f"{path}: transformers can't checkpoint {type(model).__name__}; leave "
            "`gradient_checkpointing` out"
        ) from error
    checkpointed: nn.Module = model
    return checkpointed


def _place(path: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: a folder or name; of a GGUF file its folder, and the file."""
    place = written_out(path)
    if not place.endswith(".gguf"):
        return model_place(place), {}
    return model_place(str(Path(place).parent)), {"gguf_file": Path(place).name}


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise FusionKitError(f"{what} needs transformers; pip install 'fusionkit[text]'") from error
    return transformers


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Say of what fails that no such model is there."""
    try:
        yield
    except ImportError as error:
        raise FusionKitError(f"{path}: can't be read ({_said(error)})") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no Hugging Face model there; expected a folder with config.json and weights, "
            f"or a hub name ({_said(error)})"
        ) from error


def _said(error: BaseException) -> str:
    """The first line that an error has."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only, and no bar: that the head is newly initialised is as it should be."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
