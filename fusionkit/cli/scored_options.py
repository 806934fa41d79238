"""What a line that scores models may say, and its help."""

from dataclasses import dataclass

from fusionkit.cli.help import models_help, option, options_help
from fusionkit.cli.line import How


@dataclass
class Named:
    """What a line that evaluates takes beside models and codec.

    Args:
        data: a folder that holds each task's rows, in a folder or a file called as the task; or
            TASK=PATH for each; files (csv, json, parquet, text, npz), folders of images, or
            names of data sets on the Hub; or lm_eval:NAME, lm-eval's task of that name or YAML
            file.
        task: take these tasks alone.
        split: what the data call the rows to take (validation, say); by default test.
        limit: at most so many rows of each task.
        batch_size: rows per batch; by default the datamodule's.
        text: column of the texts; found by itself.
        label: column of the labels; found by itself.
        image: column of the images; found by itself.
        labels: what names each head's classes in their order, where its config.json does not:
            TASK=PATH of a JSON file or a model's folder, or a path in which * stands for the
            task's name.
        base: of a bundle, the base model, if it is not where it was.
        model: class path of what builds the network, where no config.json of the base says it.
        out: folder for the results (default: out).
        print_config: print the line as a recipe, and do nothing.
    """

    data: list[str] | None = None
    task: list[str] | None = None
    split: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    text: str | None = None
    label: str | None = None
    image: str | None = None
    labels: list[str] | None = None
    base: str | None = None
    model: str | None = None
    out: str | None = None
    print_config: bool = False


@dataclass
class Scored(Named):
    """What a line that scores takes, too.

    Args:
        metric: what scores the tasks, any of torchmetrics'; by default accuracy of classes, and
            so on.
        finetuned_scores: scores.json of the fine-tuned models, to relate scores to.
    """

    metric: str | None = None
    finetuned_scores: str | None = None


@dataclass
class Compared(Scored):
    """What a line that compares codecs takes, too.

    Args:
        codecs: a list, as svd,sketch,emr or svd:rank=32:dtype=int4,svd:energy=0.9; what a codec
            needs, and is not given, is as usual (default: sketch,svd,emr).
        calibrated: each codec that has parts to learn calibrated, too.
        published: YAML files of published figures, shown beside ours and marked.
        recalibrate: re-estimate BatchNorm's statistics of what each codec gives, on unlabelled
            rows.
    """

    codecs: list[str] | None = None
    calibrated: bool = False
    published: list[str] | None = None
    recalibrate: bool = False


@dataclass
class AsTheyAre(How):
    """What a line may say of models that need not be compressed.

    Args:
        codec: id or class of a codec to compress the fine-tuned models by, its settings as options
            (fusionkit codecs CODEC); test and predict take the models as they are without it.
    """

    codec: str | None = None


def scored_help(verb: str, summary: str, own: type[Named]) -> str:
    """The help of such a verb.

    Args:
        verb: the verb.
        summary: what it does.
        own: its own options.
    """
    compares = "codecs" in own.__dataclass_fields__
    usages = [
        f"{verb} BASE FINETUNED… --data DATA… [options]",
        f"{verb} --config R.yaml [--model.SETTING VALUE…]",
    ]
    usages = usages if compares else [f"{verb} BUNDLE --data DATA… [options]", *usages]
    lines = [
        *(
            f"{'usage:' if not place else '      '} fusionkit {each}"
            for place, each in enumerate(usages)
        ),
        "",
        summary,
        "",
        *([] if compares else option("BUNDLE", "a bundle's folder")),
        *models_help(),
        "",
        *options_help(own),
        *options_help(AsTheyAre),
        "",
        "What else a recipe has may be added as --trainer.SETTING VALUE, --data.…, --model.…;",
        f"'fusionkit {verb} --config R.yaml --help' lists all; --print_config writes the recipe.",
    ]
    return "\n".join(lines)
