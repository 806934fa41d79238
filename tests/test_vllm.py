"""The resolver for vLLM, held against vLLM's own interface: installed, or as 0.33 defines it.

vLLM is too large for the tests. Where it is not installed, a stand-in has the names, signatures
and checks of `vllm/lora/resolver.py` and `vllm/lora/request.py` of vLLM 0.33.0.
"""

import asyncio
import inspect
import json
import logging
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import talking

import fusionkit
from fusionkit import SVD, Bundle
from fusionkit.errors import BundleError

ROOT = Path(__file__).parents[1]


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """FusionKit's module for vLLM, imported with vLLM's interface, and the registry."""
    if find_spec("vllm") is None:
        parts = {
            "vllm": {},
            "vllm.lora": {},
            "vllm.lora.request": {"LoRARequest": LoRARequest},
            "vllm.lora.resolver": {
                "LoRAResolver": LoRAResolver,
                "LoRAResolverRegistry": Registry(),
            },
        }
        for name, content in parts.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fusionkit.vllm", raising=False)
    found: Any = import_module("fusionkit.vllm")
    found.LoRAResolverRegistry.resolvers.clear()
    yield found
    sys.modules.pop("fusionkit.vllm", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, two fine-tunes of it, and their bundle, of rank 6."""
    folder = tmp_path_factory.mktemp("models")
    talking.bundle("llama, untied", folder)
    return folder


def registered(vllm: Any, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Any:
    """The resolver as vLLM gets it: through the entry point, by environment variables."""
    for name, value in settings.items():
        monkeypatch.setenv(f"FUSIONKIT_VLLM_{name.upper()}", str(value))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["fusionkit"].partition(
        ":"
    )
    getattr(import_module(module), function)()
    return vllm.LoRAResolverRegistry.resolvers["FusionKit"]


def resolved(resolver: Any, base: Path | str, *names: str) -> list[Any]:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora(str(base), name) for name in names))

    return asyncio.run(all_at_once())


def test_a_task_is_an_adapter_when_it_is_named(
    vllm: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = registered(vllm, monkeypatch, bundle=models / "talk.bundle", cache=tmp_path / "c")
    assert not (tmp_path / "c").exists()  # nothing is made before it is asked for
    names = ("cats", "cats", "dogs", "birds", "../cats", "cats")
    cats, again, dogs, birds, path, more = resolved(resolver, models / "base", *names)
    assert birds is path is None
    assert (cats.lora_path, cats.lora_int_id) == (again.lora_path, again.lora_int_id)
    assert cats.lora_path == more.lora_path != dogs.lora_path
    assert 0 < cats.lora_int_id != dogs.lora_int_id > 0
    assert max(cats.lora_int_id, dogs.lora_int_id) < 1 << 31
    assert [cats.lora_name, dogs.lora_name] == ["cats", "dogs"]
    expected = fusionkit.export_adapter(
        Bundle.load(models / "talk.bundle"), "cats", tmp_path / "cats", for_server="vllm"
    )
    assert "lm_head.weight" in expected
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path(cats.lora_path, file).read_bytes() == (tmp_path / "cats" / file).read_bytes()
    assert (
        json.loads(Path(cats.lora_path, "adapter_config.json").read_text())["peft_type"] == "LORA"
    )


def test_an_adapter_is_written_once_by_all_who_ask(
    vllm: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    export = vllm.export_adapter

    def counted(bundle: Bundle, task: str, *args: Any, **kwargs: Any) -> list[str]:
        written.append(task)
        return export(bundle, task, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(vllm, "export_adapter", counted)
    one, other = (vllm.BundleResolver(models / "talk.bundle", tmp_path) for _ in range(2))

    async def both() -> list[Any]:
        asked = (each.resolve_lora(str(models / "base"), "cats") for each in (one, other) * 3)
        return await asyncio.gather(*asked)

    found = asyncio.run(both())
    assert written == ["cats"]
    assert len({request.lora_path for request in found}) == 1


def test_a_bundle_that_changes(
    vllm: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = models / "base"
    fusionkit.compress(str(base), {"cats": str(models / "cats")}, SVD(2), tmp_path / "b")
    resolver = vllm.BundleResolver(tmp_path / "b", tmp_path / "c")
    [cats, dogs] = resolved(resolver, base, "cats", "dogs")
    assert dogs is None
    fusionkit.add_tasks(Bundle.load(tmp_path / "b"), {"dogs": str(models / "dogs")})
    [same, dogs] = resolved(resolver, base, "cats", "dogs")
    assert same.lora_path == cats.lora_path
    assert dogs is not None
    tasks = {"cats": str(models / "dogs")}
    fusionkit.compress(str(base), tasks, SVD(2), tmp_path / "b", overwrite=True)
    [other] = resolved(resolver, base, "cats")
    assert other.lora_path != cats.lora_path
    assert other.lora_int_id != cats.lora_int_id
    assert resolved(resolver, base, "dogs") == [None]


def test_another_base_has_no_adapters(
    vllm: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resolver = vllm.BundleResolver(models / "talk.bundle", tmp_path)
    assert resolved(resolver, models / "dogs", "cats") == [None]
    assert "is not the base that this bundle was made from" in caplog.text
    assert not list(tmp_path.glob("*/adapter_config.json"))
    given = vllm.BundleResolver(models / "talk.bundle", tmp_path, base=str(models / "base"))
    [cats] = resolved(given, models / "dogs", "cats")  # the same base, served in another form
    config = json.loads(Path(cats.lora_path, "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / "dogs")


def test_what_is_left_out_is_logged(
    vllm: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.fusionkit")
    resolver = vllm.BundleResolver(models / "talk.bundle", tmp_path)
    resolved(resolver, models / "base", "cats")
    [warning] = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "'cats' leaves out" in warning
    assert "lm_head.weight" in warning


def test_the_settings(vllm: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.register()  # none is set: nothing happens
    assert "FusionKit" not in vllm.LoRAResolverRegistry.resolvers
    with pytest.raises(BundleError, match="nowhere"):
        registered(vllm, monkeypatch, bundle="nowhere")
    with pytest.raises(BundleError, match="FUSIONKIT_VLLM_RANK is 'big'; expected a whole number"):
        registered(vllm, monkeypatch, bundle=models / "talk.bundle", rank="big")


def test_the_interface(vllm: Any) -> None:
    own, theirs = vllm.BundleResolver.resolve_lora, vllm.LoRAResolver.resolve_lora
    assert list(inspect.signature(own).parameters) == list(inspect.signature(theirs).parameters)
    assert inspect.iscoroutinefunction(own)
    assert not inspect.isabstract(vllm.BundleResolver)
