"""`fusionkit fuse`, and the function behind it: fuse every set of tasks, and score the fusions."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from fusionkit.calibration.lorahub import Batches, LoraHub, search_scale
from fusionkit.checkpoints.checkpoint import find_checkpoints
from fusionkit.checkpoints.paths import is_there, open_path
from fusionkit.cli import report
from fusionkit.cli.earlier import same_recipe
from fusionkit.cli.fit import FINETUNED, FitCLI, train
from fusionkit.cli.fusion_report import Fusion, FusionReport
from fusionkit.cli.recipe import quiet
from fusionkit.cli.test import evaluate, plain_trainer
from fusionkit.errors import DataError, FamilyError, FusionKitError
from fusionkit.merges.base import Merge
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.task_source import TaskSource
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.only import names_of, only
from fusionkit.tasks.scores import Scores
from fusionkit.tasks.task import Task

_SINGLE = "single"
_LORAHUB = "LoraHub"
_THERE = "finetuned"


def run(args: list[str]) -> None:
    """Train families of adapters, fuse every set of their tasks, and score the fusions."""
    cli = FuseCLI(args)
    results, out = cli.fuse(), cli.out
    report.show(results)
    report.show(f"written: {out / 'fuse.csv'}, {out / 'fuse.json'}")
    report.show(f"plot: {out / 'fuse.png'}" if report.plots_are_there() else report.WITHOUT_PLOTS)


class FuseCLI(FitCLI):
    """Train families of adapters, fuse every set of their tasks, score: one table and plot.

    Whatever is in `--out` already is kept: training resumes from its last checkpoint, and what
    was scored is not scored again.
    """

    verb = "fuse"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What to train, and how to fuse it."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--families",
            type=dict[str, dict[str, Any]],
            required=True,
            help="what to train: a name for the table → settings of the model that differ; "
            "or `finetuned`, a path with a * for the task, of adapters that are there",
        )
        parser.add_argument(
            "--merges", type=dict[str, Merge], required=True, help="a name for the table → a merge"
        )
        parser.add_argument(
            "--scales", type=list[float], default=[], help="tried for merges that have a scale"
        )
        parser.add_argument(
            "--lorahub", type=LoraHub | None, default=None, help="search weights by LoraHub, too"
        )
        parser.add_argument(
            "--search_batches",
            type=int,
            default=4,
            help="validation batches per task to search scales and weights on",
        )

    def before_instantiate_classes(self) -> None:
        """Keep the recipe as it was: each fit takes its own settings from it."""
        self._recipe = self.config.clone()
        known = self.config["model"]["init_args"]
        for family, settings in self.config["families"].items():
            if unknown := [key for key in settings if key not in known and key != _THERE]:
                raise FusionKitError(f"families: {family}: the model has no setting '{unknown[0]}'")
            self._with(settings)
        self.config["out"] = str(Path(self.config["out"]) / ".recipe")
        super().before_instantiate_classes()
        self.config = self._recipe.clone()

    def fuse(self) -> FusionReport:
        """Train what is missing, fuse, score; write as rows come in.

        Raises:
            DataError: the datamodule has no `tasks`.
            FusionKitError: `--out` holds the results of another recipe.
        """
        out, tasks = self.out, names_of(self.datamodule)
        results = self._earlier(out)
        merges, lorahub = self.config_init["merges"], self.config_init["lorahub"]
        for name, settings in self._recipe["families"].items():
            module = self._reuse(settings, self._paths(name, settings, tasks, out))
            results = fuse(
                {name: module},
                self.datamodule,
                merges,
                out,
                scales=self._recipe["scales"],
                lorahub=lorahub,
                search_batches=self._recipe["search_batches"],
                trainer=self.trainer,
                earlier=results,
                verbose=True,
            )
        return results

    def _earlier(self, out: Path) -> FusionReport:
        """What an earlier run of the same recipe has scored already."""
        rows, config = out / "fuse.json", out / "config.yaml"
        text = self.parser.dump(self._recipe, skip_none=False)
        begun = is_there(rows) or any(out.glob(f"*/*/{FINETUNED}"))
        if begun or any(out.glob("*/*/checkpoints/last.ckpt")):
            if not same_recipe(config, text):
                raise FusionKitError(
                    f"{out}: holds the results of another recipe ({config}); give another --out"
                )
        else:
            report.replace_file(config, text.encode())
        earlier = json.loads(rows.read_text()) if is_there(rows) else []
        return FusionReport([Fusion(**row) for row in earlier])

    def _paths(
        self, family: str, settings: dict[str, Any], tasks: list[str], out: Path
    ) -> dict[str, str]:
        """The fine-tuned adapters: those that are there already, or else trained."""
        if _THERE not in settings:
            for task in tasks:
                open_path(out / family / task)  # refuses a name that no folder can have
            return {task: self._finetuned(family, settings, task, out) for task in tasks}
        found = find_checkpoints(settings[_THERE])
        if missing := [task for task in tasks if task not in found]:
            raise FusionKitError(
                f"families: {family}: {settings[_THERE]} has no '{missing[0]}'; it has "
                f"{', '.join(found)}"
            )
        return {task: found[task] for task in tasks}

    def _finetuned(self, family: str, settings: dict[str, Any], task: str, out: Path) -> str:
        """The path of one fine-tuned adapter; trained, or trained further, if it is not there."""
        folder = out / family / task
        if is_there(folder / FINETUNED):
            return str(folder / FINETUNED)
        report.show(f"{family}: training '{task}'")
        self._instantiate(folder, {**settings, "task": task})
        last = folder / "checkpoints" / "last.ckpt"
        resume = str(last) if is_there(last) else None
        train(self.trainer, self.model, self.datamodule, folder / FINETUNED, resume)
        return str(folder / FINETUNED)

    def _reuse(self, settings: dict[str, Any], paths: dict[str, str]) -> ReuseModule:
        """A module of a family's adapters, on a fresh base model."""
        self._instantiate(self.out / ".recipe", settings)
        full = self.model.method == "full"
        return ReuseModule(
            self.model.model,
            finetuned=dict(paths),
            private=self.model.private,
            frozen=self.model.frozen if full else [],
            adapters="merged" if full else "modules",
            metric=self.model.metric_choice,
        )

    def _instantiate(self, out: Path, settings: dict[str, Any]) -> None:
        """Make model, data and Trainer anew, with some of the model's settings changed."""
        self.config = self._with(settings)
        self.config["out"] = str(out)
        super().before_instantiate_classes()
        # From one seed each, whatever ran before: one base for all, and a run that goes on where
        # another stopped comes to the same.
        self._set_seed()
        self.instantiate_classes()
        self.config["out"] = self._recipe["out"]

    def _with(self, settings: dict[str, Any]) -> Any:
        """The recipe with some of the model's settings changed; parsed, to check them."""
        content = self._recipe.as_dict()
        own = {key: value for key, value in settings.items() if key != _THERE}
        content["model"]["init_args"].update(own)
        return self.parser.parse_object(content)


@quiet()
def fuse(
    families: Mapping[str, ReuseModule],
    datamodule: Any,
    merges: Mapping[str, Merge],
    out: str | Path | None = None,
    *,
    scales: Sequence[float] = (),
    lorahub: LoraHub | None = None,
    search_batches: int = 4,
    trainer: Trainer | None = None,
    earlier: FusionReport | None = None,
    verbose: bool = False,
) -> FusionReport:
    """Fuse every set of a family's tasks into one model, and score it on each of them.

    A family's module reuses its last fusion afterwards.

    Args:
        families: a name for the table → a module with its base and a fine-tuned checkpoint for
            each of the datamodule's tasks.
        datamodule: the tasks' test rows; where anything is searched, validation rows, too.
        merges: a name for the table → how task vectors become one.
        out: folder for `fuse.csv` and `fuse.json`, written as rows come in, and `fuse.png`; by
            default nothing is written.
        scales: tried on validation rows for the merges that have a scale.
        lorahub: search a weight for each task, too.
        search_batches: validation batches per task to search on.
        trainer: evaluates; by default a plain one.
        earlier: what was scored already, and is not scored again.
        verbose: show in the terminal what is being done.

    Returns:
        the earlier rows, one for each task by itself, and one for each set and way of fusing it;
        a notebook shows their table.

    Raises:
        DataError: the datamodule has no `tasks`, or no validation rows to search on.
        FamilyError: a task has no fine-tuned checkpoint, or the checkpoints don't fit together.
        FusionKitError: `out` is a URL.
    """
    folder = None if out is None else report.local_folder(out)
    trainer = trainer or plain_trainer()
    tasks = names_of(datamodule)
    searches = lorahub is not None or bool(scales)
    batches = _batches(datamodule, trainer, tasks, search_batches) if searches else {}
    results = FusionReport(list(earlier.rows) if earlier else [])
    for name, module in families.items():
        if lacking := [task for task in tasks if task not in module.finetuned]:
            raise FamilyError(f"{name}: there is no fine-tuned checkpoint of task '{lacking[0]}'")
        fusing = _Fusing(
            name, module, datamodule, trainer, merges, scales, lorahub, batches, results, folder
        )
        fusing.singles(tasks)
        for chosen in _sets(tasks):
            fusing.fused(chosen)
            if verbose:
                report.show(f"{name}: {', '.join(chosen)}: done")
    if folder is not None:
        report.write_rows(results.flat(), folder, "fuse")
        if report.plots_are_there():
            results.plot(folder / "fuse.png")
    return results


class _Fusing:
    """One family's fusions, measured one after the other.

    Args:
        name: the family's, for the table.
        module: evaluates.
        datamodule: the tasks' rows.
        trainer: evaluates.
        merges: see `fuse`.
        scales: see `fuse`.
        lorahub: see `fuse`.
        batches: to search on.
        results: what was scored; rows are added.
        out: where they are written, if at all.
    """

    def __init__(
        self,
        name: str,
        module: ReuseModule,
        datamodule: Any,
        trainer: Trainer,
        merges: Mapping[str, Merge],
        scales: Sequence[float],
        lorahub: LoraHub | None,
        batches: Batches,
        results: FusionReport,
        out: Path | None,
    ) -> None:
        self.name, self.module, self.datamodule, self.trainer = name, module, datamodule, trainer
        self.merges, self.scales, self.lorahub, self.batches = merges, scales, lorahub, batches
        self.results, self.out = results, out
        self.done = {row.key: row for row in results.rows}
        self.own: dict[str, float] = {}
        # Asked of what is searched on alone: a datamodule may know of the others once it is set up.
        searched = list(batches)
        self.kinds: Mapping[str, Task] = kinds_of(datamodule, searched, module.num_classes)

    def singles(self, tasks: Sequence[str]) -> None:
        """Score each task's own model."""
        self.family = self.module.family()
        for task in tasks:
            key = (self.name, _SINGLE, task)
            if key not in self.done:
                scores = self._scores(self.family, [task])
                self._add(Fusion(*key, 1, scores.mean, 1.0, percent=scores.percent))
            self.own[task] = self.done[key].score

    def fused(self, tasks: Sequence[str]) -> None:
        """Fuse some tasks every way, and score each fusion on all of them."""
        family = self.module.family(tasks)
        for method in [*self.merges, *([_LORAHUB] if self.lorahub else [])]:
            key = (self.name, method, "+".join(tasks))
            if key in self.done:
                continue
            merge = self._merge(method, family)
            scores = self._scores(Fused(family, merge), tasks)
            shares = [scores.share_of(task) for task in tasks]
            share = mean(math.nan if each is None else each for each in shares)
            row = Fusion(*key, len(tasks), scores.mean, share, repr(merge), scores.percent)
            self._add(row)

    def _merge(self, method: str, family: Family) -> Merge:
        """How to fuse, with its scale or weights searched."""
        batches = {task: self.batches[task] for task in family.tasks if task in self.batches}
        if method in self.merges:
            merge = self.merges[method]
            return search_scale(self.module, family, merge, self.scales, batches, self.kinds)
        assert self.lorahub is not None
        return self.lorahub.search(self.module, family, batches, self.kinds)

    def _scores(self, source: TaskSource, tasks: Sequence[str]) -> Scores:
        self.module.reuse(source)
        scores = evaluate(self.module, only(self.datamodule, tasks), self.trainer)
        return replace(scores, finetuned=self.own)

    def _add(self, row: Fusion) -> None:
        self.results.rows.append(row)
        self.done[row.key] = row
        if self.out is not None:
            report.write_rows(self.results.flat(), self.out, "fuse")


def _set_up(datamodule: Any, trainer: Trainer) -> None:
    """Have a datamodule's rows read, as the Trainer does before it validates."""
    datamodule.trainer = trainer
    per_node: bool = datamodule.prepare_data_per_node
    if trainer.local_rank == 0 and (per_node or trainer.node_rank == 0):
        datamodule.prepare_data()
    trainer.strategy.barrier("prepare_data")
    datamodule.setup("validate")


def _batches(datamodule: Any, trainer: Trainer, tasks: Sequence[str], count: int) -> Batches:
    """A few validation batches of each task, spread over all of them."""
    if not is_overridden("val_dataloader", datamodule):
        raise DataError(
            f"{type(datamodule).__name__} has no validation rows to search on; leave `scales` and "
            "`lorahub` out"
        )
    _set_up(datamodule, trainer)
    picked = {}
    for task, loader in zip(tasks, datamodule.val_dataloader(), strict=True):
        batches = list(loader)
        if not batches:
            raise DataError(f"no validation rows of '{task}' to search on; raise val_fraction")
        picked[task] = batches[:: max(len(batches) // count, 1)][:count]
    return picked


def _sets(tasks: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All sets of two tasks and more."""
    for count in range(2, len(tasks) + 1):
        yield from combinations(tasks, count)
