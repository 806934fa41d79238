"""LinearizedLoRA: kept as what moved, fused by hand, refused elsewhere, exported as a LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEAD, TASKS, FewDigits, Fits, finetune, outputs, tiny_vit, trainer
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import fusionkit
from fusionkit import (
    TIES,
    Bundle,
    Checkpoint,
    Dense,
    Family,
    LinearizedLoRA,
    Mean,
    Merge,
    TaskArithmetic,
    Weighted,
    add_tasks,
    export_adapter,
)
from fusionkit.checkpoints.adapters.folder import AdapterFolder
from fusionkit.checkpoints.adapters.start import start_of
from fusionkit.errors import CodecError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.finetune import Finetune
from fusionkit.tasks.only import only
from fusionkit.testing import Arguments, CodecContract

pytest_plugins = ["fits"]

SCALE = 8 / 4
WEIGHTS = {"digit": 0.7, "rotation": -0.4, "parity": 1.1}


def compressed(fits: Fits, codec: LinearizedLoRA, folder: Path, **options: Any) -> Bundle:
    settings = {"private": HEAD, "adapters": "modules", **options}
    fusionkit.compress(tiny_vit(), fits.paths, codec, folder, **settings)
    return Bundle.load(folder, tiny_vit())


def stored_names(folder: Path) -> dict[str, set[str]]:
    return {path.name: set(load_file(path)) for path in folder.glob("*.safetensors")}


def factors(fits: Fits) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Every module's A₀, and its B of every task, straight from the files."""
    files = {task: load_file(p / "adapter_model.safetensors") for task, p in fits.paths.items()}
    tensors = {
        task: {n.removeprefix("base_model.model."): t for n, t in file.items()}
        for task, file in files.items()
    }
    start = start_of(
        folder := AdapterFolder(fits.paths["digit"]), folder.layout(Checkpoint.of(tiny_vit()))
    )[1]
    modules = [n.removesuffix(".lora_A.weight") for n in start if ".lora_A." in n]
    return (
        {m: start[f"{m}.lora_A.weight"] for m in modules},
        {m: {t: tensors[t][f"{m}.lora_B.weight"] for t in TASKS} for m in modules},
    )


class TestKept:
    def test_restores_every_task_to_fp16(self, linearized: Fits, tmp_path: Path) -> None:
        bundle = compressed(linearized, LinearizedLoRA(), tmp_path / "b")
        starts, moved = factors(linearized)
        reuse = ReuseModule(tiny_vit())
        reuse.reuse(bundle)
        for task in TASKS:
            state = bundle.state_dict(task)
            base = tiny_vit().state_dict()
            for module, start in starts.items():
                wanted = base[f"{module}.weight"] + SCALE * moved[module][task] @ start
                gap = (state[f"{module}.weight"] - wanted).abs().max()
                assert 0 < gap < 2e-3 * (wanted - base[f"{module}.weight"]).abs().max()
            reuse.switch(task)
            trained = outputs(linearized.modules[task].model, task)
            torch.testing.assert_close(outputs(reuse, task), trained, rtol=1e-2, atol=1e-2)

    def test_fp32_is_exact(self, linearized: Fits, tmp_path: Path) -> None:
        bundle = compressed(linearized, LinearizedLoRA(dtype="fp32"), tmp_path / "b")
        for task in TASKS:
            for name, tensor in bundle.adapter_tensors(task).items():
                assert torch.equal(tensor, AdapterFolder(linearized.paths[task]).tensors[name])

    def test_a_task_is_its_b_and_its_head(self, linearized: Fits, tmp_path: Path) -> None:
        compressed(linearized, LinearizedLoRA(), tmp_path / "b")
        starts, _ = factors(linearized)
        names = stored_names(tmp_path / "b")
        assert names.keys() == {f"task-{task}.safetensors" for task in TASKS}
        wanted = {f"{module}.lora_B.weight/values" for module in starts}
        wanted |= {"head.weight/tensor", "head.bias/tensor"}
        for own in names.values():
            assert own == wanted

    def test_a_stored_start_is_kept_once(self, tmp_path: Path) -> None:
        """Of a base in bf16, whose start no seed replays."""
        paths = {}
        for task in ("digit", "rotation"):
            module = Finetune(
                tiny_vit().bfloat16(),
                task,
                "linearized_lora",
                private=HEAD,
                target_modules=["qkv"],
                rank=4,
            )
            data = only(FewDigits(), [task])
            trainer(2, precision="bf16-mixed").fit(module, datamodule=data)
            paths[task] = module.save(tmp_path / task)
        fusionkit.compress(
            tiny_vit().bfloat16(),
            paths,
            LinearizedLoRA(),
            tmp_path / "b",
            private=HEAD,
            adapters="modules",
        )
        names = stored_names(tmp_path / "b")
        start = load_file(paths["digit"] / "initial.safetensors")
        assert names.pop("shared.safetensors") == {f"start:{name}/tensor" for name in start}
        assert all(not any(n.startswith("start:") for n in own) for own in names.values())
        bundle = Bundle.load(tmp_path / "b", tiny_vit().bfloat16())
        assert all(torch.equal(bundle.initial[name], start[name]) for name in start)
        for path in paths.values():  # the bundle needs none of them any more
            (path / "initial.safetensors").unlink()
        bundle.state_dict("rotation")

    def test_a_task_added_later(self, linearized: Fits, tmp_path: Path) -> None:
        whole = compressed(linearized, LinearizedLoRA(), tmp_path / "whole")
        two = dict(list(linearized.paths.items())[:2])
        fusionkit.compress(
            tiny_vit(),
            two,
            LinearizedLoRA(),
            tmp_path / "b",
            private=HEAD,
            adapters="modules",
        )
        bundle = Bundle.load(tmp_path / "b", tiny_vit())
        add_tasks(bundle, {"parity": linearized.paths["parity"]})
        for task in TASKS:
            found, wanted = bundle.state_dict(task), whole.state_dict(task)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def ties(vectors: Tensor, density: float, total: int, every: Tensor) -> Tensor:
    """TIES of one tensor, its thresholds over all of each task's vector (2306.01708)."""
    count = round(density * total)
    kept = []
    for row, whole in zip(vectors, every, strict=True):
        limit = whole.abs().sort(descending=True).values[count - 1]
        kept.append(torch.where((row.abs() >= limit) & (row != 0), row, 0.0))
    trimmed = torch.stack(kept)
    sign = trimmed.sum(0).sign()
    agreed = torch.where(trimmed * sign > 0, trimmed, 0.0)
    return agreed.sum(0) / (agreed != 0).sum(0).clamp(min=1)


class TestFused:
    @pytest.mark.parametrize(
        ("merge", "weights"),
        [
            (Mean(), dict.fromkeys(TASKS, 1 / 3)),
            (TaskArithmetic(0.6), dict.fromkeys(TASKS, 0.6)),
            (Weighted(WEIGHTS), WEIGHTS),
        ],
    )
    def test_by_hand(
        self, linearized: Fits, tmp_path: Path, merge: Merge, weights: dict[str, float]
    ) -> None:
        """W + s (Σ λ_t B_t) A₀, the same for all tasks; heads are each task's own."""
        bundle = compressed(linearized, LinearizedLoRA(merge, "fp32"), tmp_path / "b")
        assert bundle.codec == LinearizedLoRA(merge, "fp32")
        starts, moved = factors(linearized)
        base = tiny_vit().state_dict()
        for task in TASKS:
            state = bundle.state_dict(task)
            for name, tensor in base.items():
                module = name.removesuffix(".weight")
                if module in starts:
                    total = sum(w * moved[module][t] for t, w in weights.items())
                    wanted = tensor + SCALE * total @ starts[module]
                    torch.testing.assert_close(state[name], wanted, rtol=1e-5, atol=1e-6)
                    assert not torch.allclose(tensor, wanted, atol=1e-3)
                elif not name.startswith("head"):
                    assert torch.equal(state[name], tensor)
            assert len(state["head.weight"]) == FewDigits().num_classes[task]
        owned = stored_names(tmp_path / "b")
        assert owned.pop("shared.safetensors") == {
            f"{module}.lora_B.weight/merged" for module in starts
        }
        assert all(own == {"head.weight/tensor", "head.bias/tensor"} for own in owned.values())

    def test_ties_by_hand(self, linearized: Fits, tmp_path: Path) -> None:
        merge = TIES(0.3)
        bundle = compressed(linearized, LinearizedLoRA(merge, "fp32"), tmp_path / "b")
        starts, moved = factors(linearized)
        every = torch.stack(
            [torch.cat([moved[module][t].flatten() for module in starts]) for t in TASKS]
        )
        total = every.shape[1]  # A never moves, and is not counted
        base, state = tiny_vit().state_dict(), bundle.state_dict("digit")
        for module, start in starts.items():
            stacked = torch.stack([moved[module][task] for task in TASKS])
            wanted = base[f"{module}.weight"] + SCALE * ties(stacked, 0.3, total, every) @ start
            torch.testing.assert_close(state[f"{module}.weight"], wanted, rtol=1e-5, atol=1e-6)


class TestRefusals:
    def test_plain_adapters(self, lora: Fits, ia3: Fits, tmp_path: Path) -> None:
        for fits in (lora, ia3):
            with pytest.raises(CodecError, match=r"--model\.method linearized_lora.*Dense.*Merged"):
                compressed(fits, LinearizedLoRA(), tmp_path / "b")

    def test_merged_adapters_and_full_models(
        self, linearized: Fits, full: Fits, tmp_path: Path
    ) -> None:
        with pytest.raises(CodecError, match="set adapters: modules"):
            compressed(linearized, LinearizedLoRA(), tmp_path / "b", adapters="merged")
        frozen = ["patch_embed.*", "pos_embed", "blocks.0.norm*"]
        with pytest.raises(CodecError, match="set adapters: modules"):
            compressed(full, LinearizedLoRA(), tmp_path / "b", adapters="merged", frozen=frozen)
        assert not list(tmp_path.iterdir())

    def test_a_weight_that_is_missing(self, linearized: Fits, tmp_path: Path) -> None:
        with pytest.raises(CodecError, match="no weight of task 'rotation'"):
            compressed(linearized, LinearizedLoRA(Weighted({"digit": 1.0})), tmp_path / "b")
        assert not list(tmp_path.iterdir())


class TestExport:
    @pytest.mark.parametrize("merge", [None, Mean()])
    def test_is_a_plain_lora_with_the_same_outputs(
        self, linearized: Fits, tmp_path: Path, merge: Merge | None
    ) -> None:
        bundle = compressed(linearized, LinearizedLoRA(merge, "fp32"), tmp_path / "b")
        reuse = ReuseModule(tiny_vit())
        reuse.reuse(bundle)
        for task in TASKS:
            export_adapter(bundle, task, tmp_path / task, dtype="fp32")
            folder = AdapterFolder(tmp_path / task)
            assert folder.config["peft_type"] == "LORA"
            assert {shape[0] for n, (shape, _) in _specs(folder) if ".lora_A." in n} == {4}
            base = tiny_vit()
            base.head = nn.Linear(64, FewDigits().num_classes[task])
            loaded = PeftModel.from_pretrained(base, str(tmp_path / task))
            reuse.switch(task)
            wanted = outputs(reuse, task)
            torch.testing.assert_close(outputs(loaded, task), wanted, rtol=1e-4, atol=1e-5)
            if merge is None:
                trained = outputs(linearized.modules[task].model, task)
                torch.testing.assert_close(wanted, trained, rtol=1e-4, atol=1e-5)
            Family(tiny_vit(), {task: tmp_path / task}, HEAD)  # as FusionKit reads it, too


def _specs(folder: AdapterFolder) -> list[tuple[str, tuple[tuple[int, ...], Any]]]:
    return [(name, (spec.shape, spec.dtype)) for name, spec in folder.tensors.specs.items()]


def test_one_pass_of_dense_is_what_it_keeps(linearized: Fits, tmp_path: Path) -> None:
    """The same values as Dense; LinearizedLoRA adds what it is for, and what it refuses."""
    own = compressed(linearized, LinearizedLoRA(), tmp_path / "a")
    fusionkit.compress(
        tiny_vit(),
        linearized.paths,
        Dense(),
        tmp_path / "b",
        private=HEAD,
        adapters="modules",
    )
    dense = Bundle.load(tmp_path / "b", tiny_vit())
    for task in TASKS:
        found, wanted = own.state_dict(task), dense.state_dict(task)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_further_trained_task_changes_nothing_for_others(
    linearized: Fits, tmp_path: Path
) -> None:
    """Tasks trained apart from one seed fit together: fusing needs no common training run."""
    longer = finetune("digit", "linearized_lora", steps=7).save(tmp_path / "digit")
    paths = {**linearized.paths, "digit": longer}
    family = Family(tiny_vit(), paths, HEAD, adapters="modules")
    assert family.space is not None
    assert family.space.summary == "linearized lora on 8 modules, start: seed 0"


class TestContract(CodecContract):
    codecs = (LinearizedLoRA(), LinearizedLoRA(TIES(), dtype="bf16"))

    @pytest.fixture(autouse=True)
    def _fits(self, linearized: Fits) -> None:
        self.fits = linearized

    def models(self, folder: Path, dtype: torch.dtype) -> Arguments:
        finetuned = dict(self.fits.paths)
        return {"base": tiny_vit(), "finetuned": finetuned, "private": HEAD, "adapters": "modules"}
