"""The registry: real entry points, configs through JSON, and plugins that are at fault."""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from processes import together
from program import run
from tiny_net import TASKS, TESTS, Files, TinyNet

import fusionkit
from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Bundle,
    Dense,
    Elect,
    Family,
    LinearizedLoRA,
    MagnitudePrune,
    Mean,
    Merged,
    Normalized,
    Sketch,
    TaskArithmetic,
    Weighted,
)
from fusionkit.errors import PluginError
from fusionkit.registry import GROUPS, Plugin, from_config, load, load_all, names, origin, to_config

CODECS, MERGES = GROUPS
PLUGIN = TESTS / "plugin"
BUILT_IN: list[Plugin] = [
    Dense(),
    Dense("int4"),
    EMR(),
    EMR(rescale="l2", scope="tensor", dtype="bf16"),
    MagnitudePrune(),
    MagnitudePrune(0.05, scope="tensor", merge=TIES(density=0.1, aggregate="sum")),
    Merged(),
    Merged(TaskArithmetic(0.4), dtype="fp32"),
    SVD(rank=4),
    SVD(energy=0.9, method="exact", vectors="drop"),
    SVD(rank={"a.*": 2, "*": 3}),
    SVD(budget=1000),
    Sketch(bits=0.1),
    Sketch(bytes=10_000, share="equal", seed=3),
    LinearizedLoRA(),
    LinearizedLoRA(Weighted({"ant": 0.5, "bee": -1.5}), "bf16"),
    DBMS(SVD(rank=1)),
    DBMS(EMR(), MagnitudePrune(0.1), grid=(0.0, 0.5)),
    Normalized(TIES()),
    Weighted({"ant": 1.0}),
    Elect(),
    Mean(),
    TaskArithmetic(0.25),
    TIES(),
]

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution: its code and its entry points, in a folder of the path."""

    def install(name: str, code: str, points: str, group: str = CODECS) -> Path:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return folder

    return install


@pytest.fixture
def ternary(monkeypatch: pytest.MonkeyPatch) -> type[Plugin]:
    """The third party's codec, installed."""
    monkeypatch.syspath_prepend(PLUGIN)
    return load(CODECS, "ternary")


# --- names and classes ------------------------------------------------------------------------


def test_the_built_in_ones_are_registered_like_any_other() -> None:
    points = [p for group in GROUPS for p in entry_points(group=group)]
    own = {(p.group, p.name) for p in points if p.dist and p.dist.name == "fusionkit"}
    assert {(p.group, p.id) for p in BUILT_IN} == own
    for plugin in BUILT_IN:
        assert load(plugin.group, plugin.id) is type(plugin)
        assert origin(type(plugin)) == ("fusionkit", version("fusionkit"))


def test_listing_names_imports_nothing(install: Install) -> None:
    install("listed_only", "raise SystemExit('imported')", "listed = listed_only:Any")
    assert "listed" in names(CODECS)
    assert names(CODECS) == sorted(names(CODECS))
    assert "listed_only" not in sys.modules


def test_what_is_installed_while_the_program_runs_is_found(install: Install) -> None:
    """In a folder that was looked into before; what is removed is gone."""
    folder = install("first", "", "first = first:Any")
    assert {"first"} == {"first", "second"} & set(names(CODECS))
    info = folder / "second-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{CODECS}]\nsecond = second:Any\n")
    assert {"first", "second"} == {"first", "second"} & set(names(CODECS))
    shutil.rmtree(info)
    assert {"first"} == {"first", "second"} & set(names(CODECS))
    sys.path.remove(str(folder))
    assert not {"first", "second"} & set(names(CODECS))


def test_a_third_partys_codec_is_found(ternary: type[Plugin]) -> None:
    assert "ternary" in names(CODECS)
    assert ternary.__module__ == "ternary_plugin"
    assert origin(ternary) == ("ternary-plugin", "0.1")
    assert load_all() == {}


def test_an_unknown_name_lists_what_is_installed(ternary: type[Plugin]) -> None:
    with pytest.raises(PluginError, match=r"no 'emrr' in fusionkit\.codecs is installed") as caught:
        load(CODECS, "emrr")
    for name in names(CODECS):
        assert f"- {name}\n" in str(caught.value) + "\n"
    assert "- ternary" in str(caught.value)


# --- plugins at fault -------------------------------------------------------------------------


def test_a_plugin_that_fails_to_import_harms_no_other(
    install: Install, ternary: type[Plugin]
) -> None:
    install("broken_plugin", "import no_such_module", "broken = broken_plugin:Broken")
    said = (
        r"'broken' of broken_plugin 1\.0 fails to import: ModuleNotFoundError: .*'no_such_module'"
    )
    assert set(names(CODECS)) >= {"broken", "ternary", "emr"}
    assert load(CODECS, "ternary") is ternary
    failures = load_all()
    assert list(failures) == [f"{CODECS}:broken"]
    assert re.search(said, str(failures[f"{CODECS}:broken"]))
    with pytest.raises(PluginError, match=said):
        load(CODECS, "broken")


FAULTS = {
    "missing = faulty:Missing": "fails to import: AttributeError",
    "value = faulty:value": "is not a dataclass for fusionkit.codecs: 3",
    "foreign = faulty:Foreign": "is not a dataclass for fusionkit.codecs",
    "bare = faulty:Bare": "is not a dataclass for fusionkit.codecs",
    "unnamed = faulty:Unnamed": "registers Unnamed as 'unnamed', but its id is 'None'",
    "other = faulty:Misnamed": "registers Misnamed as 'other', but its id is 'misnamed'; the two",
    "merge = faulty:Merge": "is not a dataclass for fusionkit.codecs",
    "plain = faulty:Plain": "is not a dataclass for fusionkit.codecs",
}
FAULTY = """
from dataclasses import dataclass
from fusionkit import DeltaCodec, Mean as Merge
from fusionkit.registry import Plugin

value = 3

class Foreign:
    id = "foreign"

class Bare(Plugin):
    id = "bare"

@dataclass(frozen=True)
class Unnamed(DeltaCodec):
    pass

@dataclass(frozen=True)
class Misnamed(DeltaCodec):
    id = "misnamed"

class Plain(DeltaCodec):
    id = "plain"
"""


@pytest.mark.parametrize("point", FAULTS)
def test_what_is_no_codec_of_that_name_is_refused(install: Install, point: str) -> None:
    install("faulty", FAULTY, point)
    name = point.split(maxsplit=1)[0]
    assert list(load_all()) == [f"{CODECS}:{name}"]
    with pytest.raises(PluginError, match=rf"faulty 1\.0 .*{re.escape(FAULTS[point])}"):
        load(CODECS, name)


def test_a_name_that_two_distributions_claim_is_refused_naming_both(
    install: Install, ternary: type[Plugin]
) -> None:
    install("rival_plugin", "", "ternary = ternary_plugin:Ternary")
    with pytest.raises(PluginError, match=r"'ternary' .*is claimed by .*; uninstall one") as caught:
        load(CODECS, "ternary")
    assert "rival_plugin 1.0" in str(caught.value)
    assert "ternary-plugin 0.1" in str(caught.value)
    assert names(CODECS).count("ternary") == 1
    assert load(CODECS, "emr") is EMR
    with pytest.raises(PluginError, match="claimed by"):
        to_config(ternary())


def test_a_distribution_seen_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ternary: type[Plugin]
) -> None:
    shutil.copytree(PLUGIN, tmp_path / "again", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path / "again")
    assert load(CODECS, "ternary") is ternary


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", BUILT_IN, ids=repr)
def test_a_config_comes_back_through_json(plugin: Plugin) -> None:
    config = to_config(plugin)
    text = json.dumps(config)
    read = json.loads(text)
    before = copy.deepcopy(read)
    back = from_config(read)
    assert back == plugin
    assert type(back) is type(plugin)
    assert json.dumps(to_config(back)) == text
    assert read == before


def test_a_config_says_what_it_is_and_whence() -> None:
    assert to_config(MagnitudePrune(0.2, merge=TaskArithmetic(0.3))) == {
        "group": "fusionkit.codecs",
        "id": "magnitude_prune",
        "settings": {
            "density": 0.2,
            "scope": "model",
            "merge": {
                "group": "fusionkit.merges",
                "id": "task_arithmetic",
                "settings": {"scale": 0.3},
                "distribution": "fusionkit",
                "version": version("fusionkit"),
            },
            "dtype": "fp16",
        },
        "distribution": "fusionkit",
        "version": version("fusionkit"),
    }


CHAIN = """
from dataclasses import dataclass
from fusionkit import Merge

@dataclass(frozen=True)
class Chain(Merge):
    id = "chain"
    merges: list[Merge]

    def prepare(self, family):
        raise NotImplementedError
"""


def test_lists_of_plugins_come_back_too(install: Install) -> None:
    install("chain_plugin", CHAIN, "chain = chain_plugin:Chain", MERGES)
    chain: Any = load(MERGES, "chain")
    plugin = Merged(chain([TIES(0.3), chain([Mean()])]))
    assert from_config(json.loads(json.dumps(to_config(plugin)))) == plugin


def test_a_setting_that_is_missing_is_refused(install: Install) -> None:
    install("chain_plugin", CHAIN, "chain = chain_plugin:Chain", MERGES)
    with pytest.raises(PluginError, match=r"'chain' can't be made .*'merges'"):
        from_config({"group": MERGES, "id": "chain", "settings": {}})


def changed(plugin: Plugin, **changes: object) -> dict[str, Any]:
    return {**to_config(plugin), **changes}


def test_an_unknown_setting_is_refused() -> None:
    config = changed(EMR(), settings={"scope": "model", "sparsity": 1}, version="9.9")
    said = r"'emr' knows no setting sparsity; it was written by fusionkit 9\.9, install"
    with pytest.raises(PluginError, match=said):
        from_config(config)
    nested = changed(Merged(), settings={"merge": changed(Mean(), settings={"typo": 1})})
    with pytest.raises(PluginError, match="'mean' knows no setting typo"):
        from_config(nested)


def test_a_group_of_no_ones_is_refused() -> None:
    config = changed(EMR(), group="console_scripts")
    with pytest.raises(PluginError, match=r"unknown plugin group 'console_scripts'; there are fus"):
        from_config(config)
    nested = changed(Merged(), settings={"merge": changed(Mean(), group="console_scripts")})
    with pytest.raises(PluginError, match="unknown plugin group 'console_scripts'"):
        from_config(nested)


@pytest.mark.parametrize("config", [None, 3, [], {}, {"group": CODECS, "id": "emr"}, "emr"])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(PluginError, match="not a codec's or merge's config"):
        from_config(config)


@pytest.mark.parametrize("name", ["trap:Trap", "trap.Trap", "trap", "", "../trap"])
def test_a_config_that_names_a_path_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "trap.py").write_text("class Trap: pass")
    monkeypatch.syspath_prepend(tmp_path)
    for group in GROUPS:
        config = {"group": group, "id": name, "settings": {}, "class_path": name}
        with pytest.raises(PluginError, match=f"no '{name}' in {group} is installed"):
            from_config(config)
    nested = changed(Merged(), settings={"merge": {"group": MERGES, "id": name, "settings": {}}})
    with pytest.raises(PluginError, match=f"no '{name}' in {MERGES} is installed"):
        from_config(nested)
    assert "trap" not in sys.modules


def test_a_config_whose_distribution_is_gone_says_which_it_was() -> None:
    config = {"group": CODECS, "id": "ternary", "settings": {}, "distribution": "ternary-plugin",
              "version": "0.1"}  # fmt: skip
    with pytest.raises(PluginError, match=r"install it: it came from ternary-plugin 0\.1; instal"):
        from_config(config)


@dataclass(frozen=True)
class Imitation(Dense):
    """A codec that takes another's name."""


@dataclass(frozen=True)
class Unregistered(Dense):
    """A codec that no distribution offers."""

    id: ClassVar[str] = "unregistered"


def test_classes_that_are_not_registered_have_no_config(base: TinyNet, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"test_registry\.Imitation is not what 'dense' is reg"):
        to_config(Imitation())
    with pytest.raises(PluginError, match="no 'unregistered' in"):
        to_config(Unregistered())
    with pytest.raises(PluginError, match="no 'unregistered' in"):
        fusionkit.compress(base, {"a": base}, Unregistered(), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# --- a third party's codec in use -------------------------------------------------------------


def test_a_third_partys_codec_compresses_to_disk_and_back(
    tmp_path: Path, files: Files, ternary: Any
) -> None:
    path = tmp_path / "bundle"
    codec = ternary(threshold=0.25)
    fusionkit.compress(files.base, files.finetuned, codec, path, private=["head.*"])
    bundle = Bundle(path)
    assert bundle.codec == codec
    family = Family(files.base, files.finetuned, private=["head.*"])
    for t, task in enumerate(TASKS):
        rebuilt = bundle.state_dict(task)
        for vectors in family:
            delta = vectors[t]
            kept = delta.abs() > 0.25 * delta.abs().max()
            wanted = torch.where(kept, delta.sign() * delta[kept].abs().mean(), 0.0)
            decoded = bundle.delta(task, vectors.name)
            assert decoded is not None
            assert torch.allclose(decoded, wanted, rtol=1e-6)
            assert torch.equal(rebuilt[vectors.name], family.base[vectors.name] + decoded)


def test_a_bundle_whose_codec_is_gone_names_its_distribution(tmp_path: Path, files: Files) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PLUGIN)
        codec: Any = load(CODECS, "ternary")
        fusionkit.compress(
            files.base, files.finetuned, codec(), tmp_path / "bundle", private=["head.*"]
        )
    with pytest.raises(PluginError, match=r"no 'ternary' .*it came from ternary-plugin 0\.1"):
        Bundle(tmp_path / "bundle")


# --- plugins at fault, as a user meets them ---------------------------------------------------


def test_codecs_reports_what_can_not_be_used(install: Install, ternary: type[Plugin]) -> None:
    """By name and reason; every other one is listed as ever."""
    install("broken_plugin", "import no_such_module", "broken = broken_plugin:Broken")
    install("rival_plugin", "", "ternary = ternary_plugin:Ternary")
    shown = " ".join(run("codecs").split())
    assert "can't be used: 'broken' of broken_plugin 1.0 fails to import" in shown
    assert "no_such_module" in shown
    assert "is claimed by" in shown
    assert "rival_plugin" in shown
    assert "│ EMR │" in shown


CLASH = """
from dataclasses import dataclass
from fusionkit import Dense

@dataclass(frozen=True)
class EMR(Dense):
    id = "other_emr"
"""


def test_a_recipe_that_asks_for_one_is_told_why(
    install: Install, ternary: type[Plugin], tmp_path: Path
) -> None:
    install("broken_plugin", "import no_such_module", "broken = broken_plugin:Broken")
    recipe = tmp_path / "r.yaml"
    arguments = "compress", "--config", recipe, "--model.bundle", tmp_path / "b"
    recipe.write_text("model: {model: {class_path: torch.nn.Identity}, codec: Broke}\n")
    shown = run(*arguments, code=2)
    assert "Ternary" in shown
    assert "not usable: broken: 'broken' of broken_plugin 1.0 fails to import" in shown
    recipe.write_text("model: {model: {class_path: torch.nn.Identity}, codec: Broken}\n")
    shown = run(*arguments, code=2)
    assert "model.codec: 'broken' of broken_plugin 1.0 fails to import: ModuleNotFound" in shown


def test_two_classes_of_one_name_are_told_apart(install: Install, tmp_path: Path) -> None:
    """Two ids, one class name: the bare name is refused, the full one works."""
    folder = install("clash_plugin", CLASH, "other_emr = clash_plugin:EMR")
    together(1, clash, folder, tmp_path)  # in another process: a class can not be unmade


def clash(rank: int, count: int, folder: Path, out: Path) -> None:
    """What the commands say where the plugin is installed."""
    sys.path.insert(0, str(folder))
    recipe = out / "r.yaml"
    recipe.write_text("model: {model: {class_path: torch.nn.Identity}}\n")

    def compress(codec: str, code: int) -> str:
        bundle = ("--model.bundle", out / "b")
        return run("compress", "--config", recipe, *bundle, "--model.codec", codec, code=code)

    said = compress("EMR", 2)
    assert "full class path to avoid ambiguity: clash_plugin.EMR, fusionkit.EMR" in said
    for codec in ("fusionkit.EMR", "clash_plugin.EMR"):
        assert "holds no tensor" in compress(codec, 1)
