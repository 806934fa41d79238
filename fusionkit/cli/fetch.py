"""`fusionkit fetch`: what a recipe reads of the Hub, downloaded, pinned and verified."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.checkpoints import hub_download
from fusionkit.checkpoints.hub_lock import Lock, Locked, lock_beside, read_lock
from fusionkit.checkpoints.hub_names import Repository
from fusionkit.checkpoints.hub_pins import fetch_line
from fusionkit.checkpoints.yaml_text import parsed_yaml
from fusionkit.cli import report
from fusionkit.cli.hub_files import listing, locked_of
from fusionkit.cli.hub_names_in import Names, Read, names_in
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.cli.recipe_file import RecipeFile
from fusionkit.cli.recipe_parser import recipes_in
from fusionkit.cli.table import Table
from fusionkit.errors import HubError, UsageError, in_line, size
from fusionkit.errors import listing as lines_of

_KINDS = {"model": "model", "dataset": "data set"}


def run(args: list[str]) -> None:
    """Download what a recipe reads of the Hub."""
    FetchCLI(args).fetch()


class FetchCLI(RecipeCLI):
    """Download what a recipe reads of the Hub, pin its commits in R.lock.yaml, and verify it all.

    The recipe's other commands then open those commits, without a network, too.
    """

    verb = "fetch"
    sections = ()
    needs_trainer = writes_out = False

    def __init__(self, args: list[str]) -> None:
        import_module("fusionkit.tasks.finetune")  # recipes name its class by itself
        self._recipes = [each for each in recipes_in(args) if each[:1] != "{"]
        self._contents = [_content(Path(each)) for each in self._recipes]
        super().__init__(args)

    def add_model_arguments(self, parser: LightningArgumentParser) -> None:
        """ReuseModule's, or of a recipe that trains any LightningModule's."""
        told = [each.get("model") for each in self._contents]
        if any(isinstance(each, dict) and "class_path" in each for each in told):
            parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        else:
            super().add_model_arguments(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Its own options; and the sections of whichever verb the recipe is for."""
        for name, meaning in {
            "dry_run": "show what would be downloaded, and end",
            "update": "take the newest commits in place of the locked ones",
            "verify": "compare the cache with the lock file, to the byte; nothing is downloaded",
        }.items():
            parser.add_argument(f"--{name}", type=bool, default=False, help=meaning)
        known = {each.dest.partition(".")[0] for each in parser._actions}
        for key in {key for each in self._contents for key in each} - known:
            parser.add_argument(f"--{key}", type=Any, default=None)
        for action in parser._actions:
            if action.dest == "model.model":
                action.required = False

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def fetch(self) -> None:
        """Do it, and show it.

        Raises:
            UsageError: no recipe is given.
            HubError: a repository can't be had, or is damaged; or the disk can't hold it all.
        """
        if not self._recipes:
            raise UsageError("which recipe? fusionkit fetch --config R.yaml")
        path = lock_beside(self._recipes[0])
        before = read_lock(path) if path.exists() else None
        names = names_in(self.config)
        for each in names.unseen:
            report.show(f"not seen: what {each} may itself read of the Hub; fetch that by hand")
        if self.config["verify"]:
            verify(path, before)
        elif not names.reads:
            report.show(f"{self._recipes[0]} names no repository of the Hub; nothing to fetch")
        else:
            self._fetch(path, before or Lock(), names)

    def _fetch(self, path: Path, before: Lock, names: Names) -> None:
        update = self.config["update"]
        reads: dict[Repository, list[Read]] = {}
        for read in names.reads:
            reads.setdefault(read.of, []).append(read)
        line = f"{fetch_line(path)} --update"
        locked = {of: _locked(of, own, before, update, line) for of, own in reads.items()}
        if update:
            _tell_moves(before, locked)
        needed = {name: hub_download.bytes_to_download(name, each) for name, each in locked.items()}
        report.show(_table(locked, needed))
        _check_space(sum(needed.values()), only_say=self.config["dry_run"])
        if self.config["dry_run"]:
            return
        kept = {} if update else before.repositories()
        report.replace_file(path, Lock.of({**kept, **locked}).text().encode())
        with _bars():
            for name, each in locked.items():
                _download(name, each, line)
        for name in sorted(names.by_name, key=str):
            hub_download.point_at(name, locked[name].commit)
            report.show(
                f"{name}: is opened by its library, by name: offline the locked commit, and "
                "with a network the newest"
            )
        report.show(f"all is there, and as locked: {path}")


def verify(path: Path, lock: Lock | None) -> None:
    """Compare the cache with a lock file, to the byte.

    Raises:
        HubError: there is no lock file, or a file is missing or damaged.
    """
    if lock is None:
        raise HubError(f"{path}: no such lock file; write it: {fetch_line(path)}")
    locked = lock.repositories()
    wrong = [
        f"{name}: {each}"
        for name, own in locked.items()
        for each in (
            *hub_download.damaged(name, own).values(),
            *(f"{file} is not in the cache" for file in hub_download.absent(name, own)),
        )
    ]
    if wrong:
        raise HubError(
            f"{path}: the cache is not what is locked:{lines_of(wrong)}\nfetch that again: "
            f"{fetch_line(path)}"
        )
    total = sum(each.nbytes for each in locked.values())
    count = sum(len(each.files) for each in locked.values())
    report.show(f"all is there, and as locked: {path} ({count:,} files, {size(total)})")


def _locked(
    name: Repository, reads: Sequence[Read], before: Lock, update: bool, line: str
) -> Locked:
    """What is to be locked of a repository; what was, where that is all that is read."""
    old = before.get(name)
    if old is None or update:
        return locked_of(listing(name), reads)
    if {*map(str, reads)} <= {*old.reads}:
        return old
    new = locked_of(listing(name, old.commit, line), reads)
    return Locked(
        old.commit,
        sorted({*old.reads, *new.reads}),
        {**old.files, **new.files},
        {
            config: {**old.splits.get(config, {}), **new.splits.get(config, {})}
            for config in {**old.splits, **new.splits}
        },
    )


def _download(name: Repository, locked: Locked, line: str) -> None:
    """Download what is not in the cache, and what is damaged there; see that all is right then.

    Raises:
        HubError: it can't be had, or the Hub itself has something else.
    """
    wrong = hub_download.damaged(name, locked)
    if wrong:
        report.show(f"{name}: damaged in the cache, and fetched again: {in_line([*wrong])}")
        hub_download.download(name, locked.commit, [*wrong], line, anew=True)
    if missing := hub_download.absent(name, locked):
        hub_download.download(name, locked.commit, missing, line)
    if wrong := hub_download.damaged(name, locked, [*wrong, *missing]):
        raise HubError(
            f"{name}: what was downloaded is not what is locked: {next(iter(wrong.values()))}; "
            f"try again, or take the newest commit: {line}"
        )


def _tell_moves(before: Lock, locked: Mapping[Repository, Locked]) -> None:
    """Say which repositories have another commit than was locked."""
    moved = False
    for name, new in locked.items():
        old = before.get(name)
        if old is not None and old.commit != new.commit:
            moved = True
            changed = [f for f in new.files if old.files.get(f) != new.files[f]]
            changed += [f for f in old.files if f not in new.files]
            files = f"changed: {in_line(changed)}" if changed else "the files are the same"
            report.show(f"{name}: moved from {old.commit[:12]} to {new.commit[:12]}; {files}")
    for name in before.repositories():
        if name not in locked:
            report.show(f"{name}: not read by the recipe any more, and no longer locked")
    if not moved:
        report.show("no commit has moved")


def _table(locked: Mapping[Repository, Locked], needed: Mapping[Repository, int]) -> Table:
    columns = ("repository", "kind", "commit", "files", "to download", "in the cache")
    table = Table("what is read of the Hub", columns, words=3, footer=1)
    for name, each in locked.items():
        sizes = size(needed[name]), size(each.nbytes - needed[name])
        table.add(str(name), _KINDS[name.kind], each.commit[:12], f"{len(each.files):,}", *sizes)
    total, missing = sum(each.nbytes for each in locked.values()), sum(needed.values())
    count = sum(len(each.files) for each in locked.values())
    table.add(f"{len(locked)} in all", "", "", f"{count:,}", size(missing), size(total - missing))
    table.note = f"{hub_download.cache_folder()}: {size(_free())} free"
    return table


def _check_space(needed: int, only_say: bool) -> None:
    """See that what is to be downloaded fits on the disk.

    Raises:
        HubError: it can't.
    """
    if needed <= (free := _free()):
        return
    said = (
        f"{hub_download.cache_folder()}: {size(needed)} are to be downloaded, and {size(free)} are "
        f"free on its disk: {size(needed - free)} are missing; make room there, or set HF_HOME to "
        "a folder on another disk"
    )
    if not only_say:
        raise HubError(said)
    report.show(said)


def _free() -> int:
    place = hub_download.cache_folder().absolute()
    return shutil.disk_usage(next(each for each in (place, *place.parents) if each.is_dir())).free


@contextmanager
def _bars() -> Iterator[None]:
    """A context in which huggingface_hub shows its progress, on a terminal alone."""
    bars: Any = import_module("huggingface_hub.utils")
    hidden = not sys.stderr.isatty() and not bars.are_progress_bars_disabled()
    if hidden:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            bars.enable_progress_bars()


def _content(recipe: Path) -> dict[str, Any]:
    """A recipe's content as its file has it; the parser says what is wrong with it."""
    file = RecipeFile(str(recipe))
    try:
        told = parsed_yaml(file.text(), file.path)
    except yaml.YAMLError:
        return {}
    content = file.written_out(told) if isinstance(told, dict) else {}
    if isinstance(piece := content.get("model"), str):
        content["model"] = _content(recipe.parent / piece)
    return content
