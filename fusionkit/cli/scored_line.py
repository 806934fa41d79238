"""A line whose models are scored: `fusionkit test BUNDLE --data …`, or `BASE FINETUNED… --data …`.

The line is made a recipe, which the verb then runs, and which `--print_config` prints.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import MANIFEST
from fusionkit.bundles.side_files import files_of
from fusionkit.checkpoints.from_config import CONFIG
from fusionkit.checkpoints.live_model import open_for
from fusionkit.checkpoints.paths import is_there, open_path
from fusionkit.cli import report
from fusionkit.cli.compress_line import as_model, tell
from fusionkit.cli.line import How, Line, codec_of, models_in, parse_line
from fusionkit.cli.named_codec import as_config
from fusionkit.cli.named_data import chosen, labels_of, paired
from fusionkit.cli.scored_options import AsTheyAre, Named, Scored, scored_help
from fusionkit.cli.words import divided, gathered
from fusionkit.errors import BundleError, FusionKitError, UsageError, in_line
from fusionkit.task_vectors.found_roles import find_roles
from fusionkit.tasks.class_names import named_classes
from fusionkit.tasks.data_of import data_recipe
from fusionkit.tasks.kinds import kinds_of

_HELP = ("--help", "-h")
_SEVERAL = ("data", "task", "labels", "codecs", "published")
_RECIPES = ("model.", "data.", "trainer.", "calibration.")
"""What the options of a recipe begin with; a line takes them, too."""
_OF_DATA = ("text", "label", "image", "limit", "batch_size")
"""Options that are a datamodule's own."""


def recipe_args(
    verb: str, summary: str, args: Sequence[str], own: type[Named] = Scored
) -> list[str] | None:
    """What a verb's recipe is to be parsed from: of a line, the recipe that it comes to.

    Args:
        verb: the verb.
        summary: what it does, for the help.
        args: the command line after it; one of a recipe is returned as it is.
        own: the verb's own options.

    Returns:
        a command line of a recipe; None, if what was asked for is printed.

    Raises:
        FusionKitError: the line can't be understood, or models and data don't fit together.
    """
    if any(re.match(r"--(config|help-all)\b", each) for each in args):
        return list(args)  # all is what a recipe takes
    line = gathered(args, _SEVERAL)
    words, options = divided(line, (*_HELP, "--print_config"))
    if any(_is_of_recipe(each, words) for each in options):
        return list(args)
    if {*_HELP} & {*options}:
        print(scored_help(verb, summary, own))
        return None
    said = parse_line(verb, line, own, AsTheyAre, _RECIPES)
    recipe = _of_bundle(verb, said) if _is_bundle(said.words) else _of_models(verb, said)
    if said.own["print_config"]:
        import yaml

        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        print(f"# fusionkit {verb} --config THIS.yaml\n{text}", end="")
        return None
    return [f"--config={json.dumps(recipe)}", *said.passed]


def _is_of_recipe(option: str, words: Sequence[str]) -> bool:
    return not words and option.startswith(tuple(f"--{each}" for each in _RECIPES))


def _is_bundle(words: Sequence[str]) -> bool:
    return len(words) == 1 and (open_path(words[0]) / MANIFEST).is_file()


def _of_bundle(verb: str, line: Line) -> dict[str, Any]:
    """The recipe of a bundle."""
    if verb == "compare":
        raise UsageError(
            f"{line.words[0]}: is a bundle; 'fusionkit compare' compresses models itself: BASE "
            "FINETUNED…; 'fusionkit test' scores a bundle"
        )
    if strange := sorted(line.given & {each.name for each in fields(How)}):
        raise UsageError(f"--{strange[0]}: a bundle has its own; leave it out")
    own = line.own
    bundle = Bundle.load(line.words[0], own["base"])
    tasks = chosen(bundle.tasks, own["task"])
    record = bundle.manifest.base
    if not own["base"] and not is_there(record.source):
        raise BundleError(
            f"{line.words[0]}: its base ({record.source}) is not there; give it as --base PATH"
        )
    base: Any = own["base"] or record.source
    settings = {
        "strip_prefix": record.strip_prefix,
        "add_prefix": record.add_prefix,
        "variant": record.variant,
        "dequantize": record.dequantized,
    }
    given = {key: value for key, value in settings.items() if value}
    if given and not own["base"]:
        base = {"class_path": "fusionkit.Checkpoint.of", "init_args": {"source": base, **given}}
    named = {task: named_classes(files_of(bundle, task).get(CONFIG)) for task in tasks}
    heads = {task: list(names) for task, names in named.items() if names}
    sections = _sections(line, tasks, own["base"] or record.source, heads)
    sections["model"] |= {"base": base, "bundle": line.words[0]}
    if bundle.manifest.private:
        sections["model"]["private"] = bundle.manifest.private
    return sections


def _of_models(verb: str, line: Line) -> dict[str, Any]:
    """The recipe of a base and fine-tuned models."""
    if len(line.words) == 1:
        raise UsageError(
            f"{line.words[0]}: is no bundle (no {MANIFEST} is in it); for models give the base "
            f"first: fusionkit {verb} BASE FINETUNED… --data …"
        )
    if not line.words:
        raise UsageError(
            f"expected a bundle, or a base and fine-tuned models: fusionkit {verb} BUNDLE --data …,"
            f" fusionkit {verb} BASE FINETUNED… --data …; or a recipe, --config R.yaml"
            + (" (--data takes all that follows it: put it last)" if line.own["data"] else "")
        )
    if line.own["base"]:
        raise UsageError("--base: is of bundles; the base is the first model: BASE FINETUNED…")
    how = line.how
    base, finetuned, left_out = models_in(verb, line.words)
    tasks = chosen(list(finetuned), line.own["task"])
    finetuned = {task: finetuned[task] for task in tasks}
    sections = _sections(line, tasks, base, finetuned)
    told = how.told
    with torch.device("meta"):
        model = _built(sections["model"]["model"])
    rounded = line.codec is None or not line.codec.restores
    opened = {task: how.opened(path) for task, path in finetuned.items()}
    found = find_roles(open_for(model, how.opened(base)), opened, **told, rounded=rounded)
    told["private"] += found.private
    told["frozen"] += found.frozen
    if not line.own["print_config"]:
        tell(finetuned, left_out, found)
    named = {task: how.as_config(path) for task, path in finetuned.items()}
    models = {"base": how.as_config(base), "finetuned": named, **told}
    compares = "codecs" in line.own
    sections["model"] |= as_model(models, None if compares else line.codec)
    if compares:
        sections |= {"codecs": _compared(line), "calibrated": line.own["calibrated"]}
        sections |= {k: line.own[k] for k in ("published", "recalibrate") if line.own[k]}
    return sections


def _sections(
    line: Line,
    tasks: list[str],
    base: str,
    heads: Mapping[str, Any],
) -> dict[str, Any]:
    """The recipe, as far as it does not depend on where the tasks come from."""
    own = line.own
    data, beside = paired(tasks, own["data"] or ())
    path = base.removeprefix("hf://")  # transformers takes names
    builder = {"class_path": own["model"]} if own["model"] else None
    recipe = data_recipe(
        data,
        model=path if builder is None or is_there(f"{base}/{CONFIG}") else _built(builder),
        heads=heads,
        labels=labels_of(tasks, own["labels"] or ()) or None,
        splits={"test": own["split"]} if own["split"] else None,
        **{name: own[name] for name in _OF_DATA},
    )
    datamodule = _class(recipe["class_path"])(**recipe["init_args"])
    if builder is None:
        kinds = kinds_of(datamodule, tasks, scored=False)
        outputs = max((each.head_size or 0 for each in kinds.values()), default=0)
        builder = {"class_path": "fusionkit.tasks.network.network", "init_args": {"path": base}}
        builder["init_args"] |= {"outputs": outputs} if outputs else {}
    if not own["print_config"]:
        _tell_data(recipe, tasks, beside)
    model = {name: own[name] for name in ("metric", "finetuned_scores") if own.get(name)}
    sections = {
        "model": {"model": builder, **model},
        "data": recipe,
        "trainer": {"accelerator": "auto", "devices": 1},
    }
    return sections if own["out"] is None else {**sections, "out": own["out"]}


def _compared(line: Line) -> dict[str, Any]:
    """What is compared: the codec with its settings, and the lists' codecs."""
    listed = [name for each in line.own["codecs"] or () for name in each.split(",") if name]
    if not listed and line.codec is None:
        listed = list(_COMPARED)
    found = [] if line.codec is None else [(line.called, line.codec)]
    found += map(codec_of, listed)
    codecs: dict[str, Any] = {}
    for name, codec in found:
        if name in codecs:
            raise UsageError(f"--codecs: '{name}' is there twice; leave one out")
        codecs[name] = as_config(codec)
    return codecs


_COMPARED = ("sketch", "svd", "emr")
"""The codecs that are compared where a line names none."""


def _tell_data(recipe: Mapping[str, Any], tasks: Sequence[str], beside: Sequence[str]) -> None:
    """Say what was found of the data."""
    report.show(f"data: {recipe['class_path'].rpartition('.')[2]} of {in_line(tasks)}")
    if beside:
        report.show(f"left out, data of no task: {in_line(beside)}")
    if "labels" in signature(_class(recipe["class_path"])).parameters:
        known = recipe["init_args"].get("labels", {})
        if unknown := [task for task in tasks if task not in known]:
            report.show(
                f"classes numbered as the data have them, as no model names its own: "
                f"{in_line(unknown)}; --labels says it otherwise"
            )


def _class(path: str) -> Any:
    """What a class path names.

    Raises:
        FusionKitError: there is no such class or function.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise FusionKitError(
            f"--model {path}: expected the class path of what builds the network, as "
            f"my_file.MyNet ({error})"
        ) from error


def _built(builder: Mapping[str, Any]) -> nn.Module:
    made: nn.Module = _class(builder["class_path"])(**builder.get("init_args", {}))
    return made
