"""Where adapters started from: replayed from a seed, stored, or not on record."""

import dataclasses
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusionkit import EMR, Bundle, Checkpoint, Dense, Family, LinearizedLoRA, Mean, add_tasks
from fusionkit.bundles.compress import compress
from fusionkit.checkpoints.adapters.folder import AdapterFolder
from fusionkit.checkpoints.adapters.start import Seeded, digest, start_of
from fusionkit.errors import BundleError, CheckpointError, FamilyError
from fusionkit.tasks.linearize import linearize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(1, 4, 2)
        self.block = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 6)})

    def forward(self, x: Tensor) -> Tensor:
        """float32 `(B, 6)` → `(B, 6)`."""
        return self.block["second"](self.block["first"](x).tanh())  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def config(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "target_modules": ["first", "second"], **settings})


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "")


def trained(folder: Path, seed: int, move: int, linear: bool = False, **settings: Any) -> Any:
    """An adapter from a seeded start, moved at random, saved with its start on record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = net()
        torch.manual_seed(seed)
        model: Any = peft.get_peft_model(base, config(**settings))  # type: ignore[arg-type]
        start = {plain(n): p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        if linear:
            linearize(model)
        generator = torch.Generator().manual_seed(move)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if ".initial_" not in n}, path)
    order = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in start))
    seeded = Seeded(seed, model.peft_config["default"].init_lora_weights, order, digest(start))
    (folder / "fusionkit.json").write_text(json.dumps({"start": dataclasses.asdict(seeded)}))
    if linear:
        edit(folder / "adapter_config.json", peft_type="LINEARIZED_LORA")
    return model, start


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def store_start(folder: Path, start: dict[str, Tensor]) -> None:
    save_file(start, folder / "initial.safetensors")
    (folder / "fusionkit.json").write_text(json.dumps({"start": {"file": "initial.safetensors"}}))


def record(folder: Path, **changes: Any) -> None:
    path = folder / "fusionkit.json"
    start = json.loads(path.read_text())["start"]
    path.write_text(json.dumps({"start": {**start, **changes}}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"second": 2}},
        {"target_modules": ["embed", "conv", "second"]},
        {"lora_bias": True},
    ],
)
def test_a_seed_replays_pefts_draw_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    _, start = trained(tmp_path / "a", seed=5, move=1, **settings)
    folder = AdapterFolder(tmp_path / "a")
    layout = folder.layout(Checkpoint.of(net()))
    state = torch.get_rng_state()
    kind, found = start_of(folder, layout)
    assert torch.equal(torch.get_rng_state(), state)
    assert kind["seed"] == 5
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_several_threads_replay_the_same_draw(tmp_path: Path) -> None:
    """Each from the random state that all of them have."""
    _, start = trained(tmp_path / "a", seed=5, move=1)
    folder = AdapterFolder(tmp_path / "a")
    layout = folder.layout(Checkpoint.of(net()))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: start_of(folder, layout)[1], range(40)))
    for each in found:
        assert all(torch.equal(each[name], start[name]) for name in start)


@pytest.mark.parametrize("changes", [{"seed": 6}, {"sha256": "0" * 64}])
def test_another_draw_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path / "a", seed=5, move=1)
    record(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=r"another start from seed .*install the PEFT"):
        compress(net(), {"t": str(tmp_path / "a")}, Dense(), adapters="modules")


@pytest.mark.parametrize("text", ["{", '{"start": {"seed": 1}}', '{"start": {"file": "no"}}'])
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    trained(tmp_path / "a", seed=5, move=1)
    (tmp_path / "a" / "fusionkit.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"fusionkit\.json.*copy"):
        compress(net(), {"t": str(tmp_path / "a")}, Dense(), adapters="modules")


class TestBundles:
    """Two tasks of one start, kept by seed or as tensors."""

    @pytest.fixture(params=["seed", "stored"])
    def paths(self, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
        for move, task in enumerate(("ant", "bee", "cat")):
            _, start = trained(tmp_path / task, seed=5, move=move)
            if request.param == "stored":
                store_start(tmp_path / task, start)
        return {task: str(tmp_path / task) for task in ("ant", "bee", "cat")}

    @pytest.mark.parametrize("codec", [Dense("fp32"), EMR(dtype="fp32")])
    def test_adapters_come_back_and_join(self, codec: Any, paths: Any, tmp_path: Path) -> None:
        """Deltas are from the start, which is kept once, or not at all."""
        two = {task: paths[task] for task in ("ant", "bee")}
        compress(net(), two, codec, tmp_path / "b", adapters="modules")
        stored = "file" in json.loads((Path(paths["ant"]) / "fusionkit.json").read_text())["start"]
        assert (tmp_path / "b/shared.safetensors").exists() == (stored or isinstance(codec, EMR))
        bundle = Bundle(tmp_path / "b", net())
        if isinstance(codec, Dense):
            add_tasks(bundle, {"cat": paths["cat"]})
            again = Bundle(tmp_path / "b", net())
            for task in paths:
                own = AdapterFolder(paths[task]).tensors
                for name, tensor in again.adapter_tensors(task).items():
                    torch.testing.assert_close(tensor, own[name])
        else:
            with pytest.raises(BundleError, match="keep_shared"):
                add_tasks(bundle, {"cat": paths["cat"]})
            add_tasks(bundle, {"cat": paths["cat"]}, keep_shared=True)
            assert "cat" in Bundle(tmp_path / "b", net()).tasks

    def test_another_start_does_not_join(self, paths: Any, tmp_path: Path) -> None:
        trained(tmp_path / "dog", seed=6, move=1)
        both = {"ant": paths["ant"], "dog": str(tmp_path / "dog")}
        with pytest.raises(FamilyError, match=r"'dog'.*another point than .*'ant'.*one seed"):
            compress(net(), both, Dense(), adapters="modules")
        bundle = compress(net(), {"ant": paths["ant"]}, Dense(), adapters="modules")
        with pytest.raises(BundleError, match="other modules, scaling or start"):
            add_tasks(bundle, {"dog": str(tmp_path / "dog")})

    def test_a_bundle_of_another_draw_is_refused(
        self, paths: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compress(net(), paths, Dense(), tmp_path / "b", adapters="modules")
        if (tmp_path / "b/shared.safetensors").exists():
            return
        monkeypatch.setattr(Seeded, "replay", lambda *_: None)
        with pytest.raises(BundleError, match="draws other initial adapters from seed 5"):
            Bundle(tmp_path / "b", net())


@pytest.mark.parametrize("zero", [True, False])
def test_linearized_adapters_fold_around_their_start(zero: bool, tmp_path: Path) -> None:
    paths, models = {}, {}
    for move, task in enumerate(("ant", "bee")):
        model, _ = trained(tmp_path / task, 5, move, linear=True, init_lora_weights=zero)
        paths[task], models[task] = str(tmp_path / task), model
    x = torch.randn(4, 6)
    bundle = compress(net(), paths, LinearizedLoRA(dtype="fp32"), adapters="modules")
    merged = compress(net(), paths, Dense("fp32"))
    for task, model in models.items():
        expected = model(x)
        for source in (bundle, merged):
            restored = net()
            restored.load_state_dict(source.state_dict(task))
            torch.testing.assert_close(restored(x), expected, rtol=1e-4, atol=1e-5)
    fused = compress(net(), paths, LinearizedLoRA(Mean(), "fp32"), adapters="modules")
    for name, tensor in fused.state_dict("ant").items():
        mean = (merged.state_dict("ant")[name] + merged.state_dict("bee")[name]) / 2
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [True, False])
def test_a_copy_of_a_linearized_adapter_needs_no_files(zero: bool, tmp_path: Path) -> None:
    trained(tmp_path / "a", 5, 1, linear=True, init_lora_weights=zero)
    adapter = Family(net(), {"t": str(tmp_path / "a")}).finetuned["t"]
    copied = adapter.in_memory()
    before = {name: adapter[name].clone() for name in adapter}
    shutil.rmtree(tmp_path / "a")
    again = copied.in_memory(torch.device("cpu"))
    for name, tensor in before.items():
        assert torch.equal(copied[name], tensor)
        assert torch.equal(again[name], tensor)


def test_a_linearized_adapter_without_its_start_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "a", 5, 1, linear=True)
    (tmp_path / "a" / "fusionkit.json").unlink()
    with pytest.raises(CheckpointError, match=r"linearized, but fusionkit\.json.*missing"):
        compress(net(), {"t": str(tmp_path / "a")}, Dense(), adapters="modules")
