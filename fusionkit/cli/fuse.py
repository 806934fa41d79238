"""`fusionkit fuse`: train families of adapters, fuse every set of tasks, and score the fusions."""

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from fusionkit.calibration.lorahub import Batches, LoraHub, search_scale
from fusionkit.checkpoints.checkpoint import find_checkpoints
from fusionkit.cli import report
from fusionkit.cli.fit import FINETUNED, FitCLI, train
from fusionkit.cli.fusion_report import Fusion, FusionReport
from fusionkit.errors import DataError, FusionKitError
from fusionkit.merges.base import Merge
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.only import only

_SINGLE = "single"
_THERE = "finetuned"


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
        """Train what is missing, fuse, score; show and write as rows come in.

        Raises:
            FusionKitError: `--out` holds the results of another recipe.
        """
        out = self.out
        results = self._earlier(out)
        merges: dict[str, Merge] = self.config_init["merges"]
        lorahub: LoraHub | None = self.config_init["lorahub"]
        data: Any = self.datamodule
        tasks: list[str] = list(data.tasks)
        kinds = kinds_of(data, tasks)
        for name, settings in self._recipe["families"].items():
            paths = self._paths(name, settings, tasks, out)
            module, family_args = self._reuse(settings, paths)
            batches = self._batches(tasks) if lorahub or self._recipe["scales"] else {}
            done = {row.key: row for row in results.rows}
            own: dict[str, float] = {}
            for task in tasks:
                key = (name, _SINGLE, task)
                if key not in done:
                    scores = self._score(module, module.family(), [task])
                    results.rows.append(Fusion(*key, 1, scores[task], 1.0))
                    report.write_rows(results.flat(), out, "fuse")
                    done[key] = results.rows[-1]
                own[task] = done[key].score
            for chosen in _sets(tasks):
                family = Family(module.family().base, {t: paths[t] for t in chosen}, **family_args)
                searched = {task: batches[task] for task in chosen if task in batches}
                for method in [*merges, *(["LoraHub"] if lorahub else [])]:
                    if (name, method, "+".join(chosen)) in done:
                        continue
                    if method in merges:
                        scales = self._recipe["scales"]
                        merge = search_scale(
                            module, family, merges[method], scales, searched, kinds
                        )
                    else:
                        assert lorahub is not None
                        merge = lorahub.search(module, family, searched, kinds)
                    scores = self._score(module, Fused(family, merge), list(chosen))
                    results.rows.append(
                        Fusion(
                            name,
                            method,
                            "+".join(chosen),
                            len(chosen),
                            sum(scores.values()) / len(scores),
                            sum(_share(scores[t], own[t]) for t in chosen) / len(chosen),
                            repr(merge),
                        )
                    )
                    report.write_rows(results.flat(), out, "fuse")
                report.show(f"{name}: {', '.join(chosen)}: done")
        report.show(results.table())
        results.plot(out / "fuse.png")
        report.show(f"written: {out / 'fuse.csv'}, {out / 'fuse.json'}\nplot: {out / 'fuse.png'}")
        return results

    def _earlier(self, out: Path) -> FusionReport:
        """What an earlier run of the same recipe has scored already."""
        rows, config = out / "fuse.json", out / "config.yaml"
        text = self.parser.dump(self._recipe, skip_none=False)
        begun = rows.exists() or any(out.glob(f"*/*/{FINETUNED}"))
        if begun or any(out.glob("*/*/checkpoints/last.ckpt")):
            if not config.exists() or config.read_text() != text:
                raise FusionKitError(
                    f"{out}: holds the results of another recipe ({config}); give another --out"
                )
        else:
            out.mkdir(parents=True, exist_ok=True)
            report.replace_file(config, text.encode())
        earlier = json.loads(rows.read_text()) if rows.exists() else []
        return FusionReport([Fusion(**row) for row in earlier])

    def _paths(
        self, family: str, settings: dict[str, Any], tasks: list[str], out: Path
    ) -> dict[str, str]:
        """The fine-tuned adapters: those that are there already, or else trained."""
        if _THERE not in settings:
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
        if (folder / FINETUNED).exists():
            return str(folder / FINETUNED)
        report.show(f"{family}: training '{task}'")
        self._instantiate(folder, {**settings, "task": task})
        last = folder / "checkpoints" / "last.ckpt"
        resume = str(last) if last.exists() else None
        train(self.trainer, self.model, self.datamodule, folder / FINETUNED, resume)
        return str(folder / FINETUNED)

    def _reuse(
        self, settings: dict[str, Any], paths: dict[str, str]
    ) -> tuple[ReuseModule, dict[str, Any]]:
        """A module on a fresh base model, and what a family of its adapters is made with."""
        self._instantiate(self.out / ".recipe", settings)
        full = self.model.method == "full"
        arguments: dict[str, Any] = {
            "private": self.model.private,
            "frozen": self.model.frozen if full else [],
            "adapters": "merged" if full else "modules",
        }
        finetuned: dict[str, Any] = dict(paths)
        return ReuseModule(self.model.model, finetuned=finetuned, **arguments), arguments

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

    def _batches(self, tasks: list[str]) -> Batches:
        """A few validation batches of each task, spread over all of them."""
        data: Any = self.datamodule
        if not is_overridden("val_dataloader", data):
            raise DataError(
                f"{type(data).__name__} has no validation rows to search on; leave `scales` and "
                "`lorahub` out"
            )
        loaders = dict(zip(tasks, data.val_dataloader(), strict=True))
        count: int = self._recipe["search_batches"]
        picked = {}
        for task, loader in loaders.items():
            batches = list(loader)
            if not batches:
                raise DataError(f"no validation rows of '{task}' to search on; raise val_fraction")
            picked[task] = batches[:: max(len(batches) // count, 1)][:count]
        return picked

    def _score(self, module: ReuseModule, source: Any, tasks: list[str]) -> dict[str, float]:
        module.reuse(source)
        self.trainer.test(module, datamodule=only(self.datamodule, tasks), verbose=False)
        assert module.scores is not None
        return module.scores.values


def _share(score: float, own: float) -> float:
    return score / own if own else math.nan


def _sets(tasks: list[str]) -> Iterator[tuple[str, ...]]:
    """All sets of two tasks and more."""
    for count in range(2, len(tasks) + 1):
        yield from combinations(tasks, count)
