"""Finetune: what is trained, what is saved, and that other tools and FusionKit read it alike."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEAD, TARGETS, TASKS, FewDigits, Fits, finetune, images, outputs, tiny_vit, trainer
from lightning.pytorch import LightningDataModule
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_net import TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit import Checkpoint, Family
from fusionkit.checkpoints.adapters.folder import AdapterFolder
from fusionkit.checkpoints.adapters.start import Seeded, start_of
from fusionkit.errors import BundleError, CheckpointError, DataError, FamilyError, FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.finetune import Finetune
from fusionkit.tasks.only import only

pytest_plugins = ["fits"]


class Tokens(LightningDataModule):
    """Random tokens of one task with `classes` classes."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.tasks, self.num_classes = ["ant"], {"ant": classes}

    def train_dataloader(self) -> list[DataLoader[Any]]:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, 11, (32, 5), generator=generator)
        return [DataLoader(TensorDataset(tokens, tokens[:, 0] % 4), 8)]


def fit_tokens(method: str, model: nn.Module | None = None, **settings: Any) -> Finetune:
    module = Finetune(model or TinyNet(), "ant", method, **{"private": HEAD, **settings})
    trainer(3).fit(module, datamodule=Tokens())
    return module


def trained_names(module: Finetune) -> set[str]:
    """Names, as the base has them, of what gets a gradient."""
    model = copy.deepcopy(module.model)
    model(images()).square().sum().backward()
    return {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


class TestPeftFolders:
    @pytest.mark.parametrize("method", ["lora", "ia3"])
    @pytest.mark.parametrize("task", TASKS)
    def test_peft_gives_the_outputs_of_the_trained_module(
        self, method: str, task: str, request: pytest.FixtureRequest
    ) -> None:
        fits: Fits = request.getfixturevalue(method)
        base = tiny_vit()
        classes = FewDigits().num_classes[task]
        if classes != 10:
            base.head = nn.Linear(64, classes)
        wanted = outputs(fits.modules[task].model, task)
        assert not torch.allclose(wanted, outputs(base, task), atol=1e-3)
        loaded = PeftModel.from_pretrained(base, str(fits.paths[task]))
        torch.testing.assert_close(outputs(loaded, task), wanted)

    @pytest.mark.parametrize("method", ["lora", "linearized", "ia3"])
    @pytest.mark.parametrize("adapters", ["merged", "modules"])
    def test_fusionkit_gives_the_outputs_of_the_trained_module(
        self, method: str, adapters: Any, request: pytest.FixtureRequest
    ) -> None:
        fits: Fits = request.getfixturevalue(method)
        reuse = ReuseModule(tiny_vit())
        reuse.reuse(Family(tiny_vit(), fits.paths, HEAD, adapters=adapters))
        for task, module in fits.modules.items():
            reuse.switch(task)
            torch.testing.assert_close(
                outputs(reuse, task), outputs(module.model, task), rtol=1e-4, atol=1e-5
            )

    def test_plain_peft_refuses_a_linearized_adapter(self, linearized: Fits) -> None:
        with pytest.raises(Exception, match="LINEARIZED_LORA"):
            PeftModel.from_pretrained(tiny_vit(), str(linearized.paths["digit"]))

    def test_only_what_is_trained_is_saved(self, lora: Fits, linearized: Fits, ia3: Fits) -> None:
        for fits in (lora, linearized, ia3):
            adapter = AdapterFolder(fits.paths["digit"])
            own = {n for n in adapter.tensors if ".lora_" in n or ".ia3_l" in n}
            assert adapter.tensors.keys() - own == {"head.weight", "head.bias"}
            assert len(own) == (8 if fits is ia3 else 16)
            assert adapter.config["inference_mode"] is True


class TestStart:
    def drawn(self, task: str = "digit", seed: int = 0) -> dict[str, Tensor]:
        """The factors that PEFT draws, called by hand."""
        base = tiny_vit()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["head"])
        state = get_peft_model(base, config).state_dict()
        return {
            name.removeprefix("base_model.model.").replace(".default", ""): tensor
            for name, tensor in state.items()
            if ".lora_" in name
        }

    @pytest.mark.parametrize("method", ["lora", "linearized"])
    def test_the_start_on_record_is_the_one_that_peft_drew(
        self, method: str, request: pytest.FixtureRequest
    ) -> None:
        fits: Fits = request.getfixturevalue(method)
        for path in fits.paths.values():
            folder = AdapterFolder(path)
            record, start = start_of(folder, folder.layout(Checkpoint.of(tiny_vit())))
            assert record["seed"] == 0
            wanted = self.drawn()
            assert start.keys() == wanted.keys()
            assert all(torch.equal(start[name], wanted[name]) for name in wanted)

    def test_a_lora_trains_both_factors(self, lora: Fits) -> None:
        tensors, start = AdapterFolder(lora.paths["digit"]).tensors, self.drawn()
        assert all(not torch.equal(tensors[name], start[name]) for name in start)
        assert trained_names(lora.modules["digit"]) == {
            *start,
            "head.modules_to_save.weight",
            "head.modules_to_save.bias",
        }

    def test_a_linearized_lora_trains_b_and_the_head_alone(self, linearized: Fits) -> None:
        for task, module in linearized.modules.items():
            tensors, start = AdapterFolder(linearized.paths[task]).tensors, self.drawn()
            moved = {name for name in start if not torch.equal(tensors[name], start[name])}
            assert moved == {name for name in start if ".lora_B." in name}
            assert trained_names(module) == {
                *moved,
                "head.modules_to_save.weight",
                "head.modules_to_save.bias",
            }

    def test_another_seed_is_another_start(self, lora: Fits, tmp_path: Path) -> None:
        other = finetune("parity", seed=1, steps=1).save(tmp_path / "other")
        paths = {"digit": lora.paths["digit"], "parity": other}
        Family(tiny_vit(), paths, HEAD)
        with pytest.raises(FamilyError, match="started from another point"):
            Family(tiny_vit(), paths, HEAD, adapters="modules")

    @pytest.mark.parametrize("method", ["lora", "linearized_lora"])
    def test_a_start_that_no_seed_replays_is_stored(self, method: str, tmp_path: Path) -> None:
        """PEFT draws for a base in bf16 what it rounds to bf16: the replay, in fp32, is told."""
        modules = {}
        for task in ("digit", "rotation"):
            module = Finetune(
                tiny_vit().bfloat16(), task, method, private=HEAD, target_modules=TARGETS, rank=4
            )
            modules[task] = module
            data = only(FewDigits(), [task])
            trainer(2, precision="bf16-mixed").fit(module, datamodule=data)
            module.save(tmp_path / task)
            record = json.loads((tmp_path / task / "fusionkit.json").read_text())
            assert record == {"start": {"file": "initial.safetensors"}}
            start = load_file(tmp_path / task / "initial.safetensors")
            tensors = AdapterFolder(tmp_path / task).tensors
            same = {n for n in start if torch.equal(tensors[n].float(), start[n].float())}
            linearized = method == "linearized_lora"
            assert same == {n for n in start if linearized and ".lora_A." in n}
        base = tiny_vit().bfloat16()
        paths = {task: tmp_path / task for task in modules}
        family = Family(base, paths, HEAD, adapters="modules")
        assert family.space is not None
        assert family.space.start == {"stored": True}
        (tmp_path / "digit/initial.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"fusionkit\.json"):
            Family(base, paths, HEAD, adapters="modules")

    def test_a_replay_that_fits_the_order_only_is_none(self, lora: Fits) -> None:
        folder = AdapterFolder(lora.paths["digit"])
        layout = folder.layout(Checkpoint.of(tiny_vit()))
        shapes = {name: folder.tensors.specs[name].shape for name in layout.tensors}
        seeded = Seeded(**folder.start["start"])
        assert seeded.replay(layout, shapes) is not None
        assert Seeded(1, seeded.init, seeded.order, seeded.sha256).replay(layout, shapes) is None


class TestFull:
    FROZEN = ("patch_embed.", "pos_embed", "blocks.0.norm")

    def test_the_file_has_the_models_names_without_frozen_ones(self, full: Fits) -> None:
        base = tiny_vit().state_dict()
        for task, path in full.paths.items():
            assert path.name == "model.safetensors"
            saved = load_file(path)
            assert saved.keys() == {n for n in base if not n.startswith(self.FROZEN)}
            state = full.modules[task].model.state_dict()
            for name, tensor in state.items():
                if name in saved:
                    assert torch.equal(saved[name], tensor), name
                    assert saved[name].shape != base[name].shape or not torch.equal(
                        saved[name], base[name]
                    )
                else:
                    assert torch.equal(tensor, base[name]), name

    def test_family_reads_it(self, full: Fits) -> None:
        family = Family(
            tiny_vit(), full.paths, HEAD, ["patch_embed.*", "pos_embed", "blocks.0.norm*"]
        )
        reuse = ReuseModule(tiny_vit())
        reuse.reuse(family)
        for task, module in full.modules.items():
            reuse.switch(task)
            torch.testing.assert_close(outputs(reuse, task), outputs(module.model, task))

    def test_tied_tensors_are_saved_once(self, tmp_path: Path) -> None:
        base = TinyNet()
        module = fit_tokens("full", TinyNet())
        path = module.save(tmp_path / "f")
        assert "decoder.weight" not in load_file(path)
        Family(base, {"ant": path}, HEAD)


class TestHead:
    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_fits_the_task(self, method: str, lora: Fits, full: Fits) -> None:
        fits = lora if method == "lora" else full
        for task, module in fits.modules.items():
            assert outputs(module.model, task).shape[1] == FewDigits().num_classes[task]

    def test_is_drawn_by_the_seed(self) -> None:
        weights = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(weights))  # of no account
            module = finetune("rotation", seed=seed, learning_rate=0.0)
            weights.append(
                module.model.get_parameter("base_model.model.head.original_module.weight")
            )
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_of_several_layers_ends_in_the_classes(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            torch.manual_seed(0)
            net = TinyNet()
            net.head = nn.Sequential(nn.Linear(11, 5), nn.LayerNorm(5), nn.Linear(5, 3))
            return net.eval()

        module = fit_tokens("lora", build(), target_modules=["hidden"], dropout=0.0)
        folder = AdapterFolder(module.save(tmp_path / "a"))
        assert folder.tensors["head.0.weight"].shape == (5, 11)
        assert folder.tensors["head.2.weight"].shape == (4, 5)
        assert not torch.equal(folder.tensors["head.1.weight"], build().head[1].weight)
        family = Family(build(), {"ant": tmp_path / "a"}, HEAD)
        assert set(family.names("delta")) == {"hidden.weight"}

    def test_a_module_whose_name_ends_like_the_heads_is_left_alone(self, tmp_path: Path) -> None:
        """PEFT's modules_to_save match by the ends of names."""

        class Net(TinyNet):
            def __init__(self) -> None:
                super().__init__()
                self.overhead = nn.Linear(8, 8)

            def forward(self, tokens: Tensor) -> Tensor:
                x = self.norm(self.conv(self.embed(tokens).mT)).relu().mean(-1)
                return self.head(self.decoder(self.hidden(self.overhead(x)).relu()))

        net = Net()
        before = net.overhead.weight.detach().clone()
        module = fit_tokens("lora", net, target_modules=["hidden"])
        saved = AdapterFolder(module.save(tmp_path / "a")).tensors
        assert {n for n in saved if "lora" not in n} == {"head.weight", "head.bias"}
        assert torch.equal(net.overhead.weight, before)


class TestWhatIsNotTrained:
    """It stays as it is, running statistics included, and is in no checkpoint."""

    @pytest.mark.parametrize("method", ["lora", "linearized_lora", "ia3"])
    def test_batch_norm_under_an_adapter(self, method: str, tmp_path: Path) -> None:
        torch.manual_seed(5)
        base = TinyNet().eval()
        settings = {"feedforward_modules": []} if method == "ia3" else {"dropout": 0.0}
        model = TinyNet()
        model.load_state_dict(base.state_dict())
        module = fit_tokens(method, model, target_modules=["hidden"], **settings)
        module.save(tmp_path / "a")
        reuse = ReuseModule(base)
        reuse.reuse(Family(base, {"ant": tmp_path / "a"}, HEAD))
        reuse.switch("ant")
        tokens = torch.randint(0, 11, (16, 5))
        with torch.no_grad():
            torch.testing.assert_close(reuse.eval()(tokens), module.eval().model(tokens))

    def test_frozen_batch_norm(self, tmp_path: Path) -> None:
        base = TinyNet().eval()
        model = TinyNet()
        model.load_state_dict(base.state_dict())
        module = fit_tokens("full", model, frozen=["norm.*"])
        for name, tensor in base.norm.state_dict().items():
            assert torch.equal(module.model.get_submodule("norm").state_dict()[name], tensor)
        path = module.save(tmp_path / "f")
        Family(base, {"ant": path}, HEAD, ["norm.*"]).check_frozen()

    def test_batch_norm_trains_in_full(self, tmp_path: Path) -> None:
        base = TinyNet()
        saved = load_file(fit_tokens("full", TinyNet()).save(tmp_path / "f"))
        assert saved["norm.num_batches_tracked"] == 3
        assert not torch.equal(saved["norm.running_mean"], base.norm.running_mean)

    @pytest.mark.parametrize("method", ["lora", "linearized_lora"])
    def test_checkpoints_hold_what_is_trained(self, method: str, tmp_path: Path) -> None:
        module = Finetune(TinyNet(), "ant", method, private=HEAD, target_modules=["hidden"], rank=2)
        run = trainer(2, default_root_dir=tmp_path)
        run.fit(module, datamodule=Tokens())
        run.save_checkpoint(tmp_path / "x.ckpt")
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        assert len(trained) == (4 if method == "lora" else 3)
        assert {n for n in state if ".initial_" not in n} == trained

    def test_frozen_tensors_are_in_no_checkpoint(self, tmp_path: Path) -> None:
        module = Finetune(TinyNet(), "ant", "full", private=HEAD, frozen=["embed.*", "norm.*"])
        run = trainer(2, default_root_dir=tmp_path)
        run.fit(module, datamodule=Tokens())
        run.save_checkpoint(tmp_path / "x.ckpt")
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        own = {"conv.weight", "conv.bias", "hidden.weight", "hidden.bias"}
        own |= {"head.weight", "head.bias"}
        assert state.keys() == {f"model.{name}" for name in own}


class TestTraining:
    def test_the_rate_rises_then_falls(self) -> None:
        steps, warmup, top = 10, 0.3, 0.5
        module = Finetune(TinyNet(4), "ant", "full", learning_rate=top, warmup=warmup)
        run = trainer(steps)
        rates = []
        take = module.training_step

        def recorded(batch: Any, batch_idx: int) -> Tensor:
            rates.append(run.optimizers[0].param_groups[0]["lr"])
            return take(batch, batch_idx)

        module.training_step = recorded  # type: ignore[method-assign]
        run.fit(module, datamodule=Tokens())
        wanted = [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
        assert rates == pytest.approx([top * share for share in wanted])

    def test_trains_on_its_own_task_whenever_it_is_fitted(self) -> None:
        """A second fit, with its own task's data again: not the first task's rows."""
        module = finetune("parity", steps=2)
        seen = []
        take = module.training_step

        def recorded(batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch[0][1])
            return take(batch, batch_idx)

        module.training_step = recorded  # type: ignore[method-assign]
        data = FewDigits()
        trainer(2).fit(module, datamodule=only(data, ["parity"]))
        assert data.tasks == list(TASKS)  # nobody's datamodule is changed
        assert set(torch.cat(seen).tolist()) == {0, 1}
        with pytest.raises(DataError, match=r"has 3 tasks, .*only\(datamodule, \['parity'\]\)"):
            trainer(2).fit(module, datamodule=data)

    def test_learns(self) -> None:
        torch.manual_seed(0)
        data = FewDigits(("photo",), rows=256)
        module = Finetune(tiny_vit(), private=HEAD, target_modules=TARGETS, learning_rate=1e-2)
        run = trainer(60)
        run.fit(module, datamodule=data)
        scores = run.validate(module, datamodule=data, verbose=False)[0]
        assert module.task == "photo"  # the only one
        assert scores["val/score"] > 0.7
        logits = outputs(module.model, "photo")
        assert scores["val/loss"] < math.log(2)
        assert logits.shape == (32, 2)

    def test_validation_scores_by_hand(self) -> None:
        module = finetune("rotation", steps=3)
        data = FewDigits(("rotation",))
        scores = trainer(1).validate(module, datamodule=data, verbose=False)[0]
        batches = list(data.val_dataloader()[0])
        x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
        with torch.no_grad():
            logits = module.eval().model(x)
        assert scores["val/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
        assert scores["val/score"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))

    def test_base_is_loaded(self, base_file: Path) -> None:
        torch.manual_seed(99)
        from fusionkit.tasks.digits import base_model

        module = Finetune(base_model(), "digit", base=str(base_file), private=HEAD)
        wanted = tiny_vit().state_dict()
        for name, tensor in module.model.state_dict().items():
            assert torch.equal(tensor, wanted[name]) or name.startswith("head")


class TestRefusals:
    """Each before a step is taken."""

    def refused(
        self, error: type[Exception], match: str, data: Any = None, **settings: Any
    ) -> None:
        own = {"private": HEAD, "target_modules": TARGETS, "task": "digit", **settings}
        module = Finetune(tiny_vit(), **own)
        run = trainer(2)
        with pytest.raises(error, match=match):
            run.fit(module, datamodule=data or only(FewDigits(), ["digit"]))
        assert run.global_step == 0

    def test_unknown_task(self) -> None:
        wanted = "no data for task 'dog'; there is digit, rotation"
        self.refused(DataError, wanted, FewDigits(), task="dog")

    def test_which_of_several_tasks(self) -> None:
        self.refused(DataError, "task.*digit, rotation, parity", FewDigits(), task=None)

    def test_data_of_no_named_tasks(self) -> None:
        rows = TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
        data = LightningDataModule.from_datasets(rows)
        self.refused(DataError, "`tasks`", data)

    @pytest.mark.parametrize("method", ["lora", "linearized_lora", "ia3"])
    def test_modules_that_do_not_exist(self, method: str) -> None:
        feed = {"feedforward_modules": []} if method == "ia3" else {}
        for targets in (["query"], ["qkv", "query"]):
            self.refused(FusionKitError, "query", target_modules=targets, method=method, **feed)

    def test_no_modules_given_for_an_unknown_architecture(self) -> None:
        self.refused(FusionKitError, "target_modules", target_modules=None)
        self.refused(FusionKitError, "feedforward_modules", method="ia3")

    def test_feedforward_modules_beyond_the_targets(self) -> None:
        self.refused(
            FusionKitError, "feedforward_modules", method="ia3", feedforward_modules=["fc2"]
        )

    def test_head_that_is_not_there(self) -> None:
        for method in ("lora", "full"):
            self.refused(FusionKitError, r"'hed\.\*'", private=["hed.*"], method=method)

    def test_frozen_pattern_that_matches_nothing(self) -> None:
        self.refused(FusionKitError, "'pos_embd'", frozen=["pos_embd"], method="full")

    def test_endless_training_has_no_rate(self) -> None:
        module = Finetune(tiny_vit(), "digit", private=HEAD, target_modules=TARGETS)
        with pytest.raises(FusionKitError, match="max_steps"):
            trainer(-1).fit(module, datamodule=only(FewDigits(), ["digit"]))

    def test_base_of_another_shape(self, tmp_path: Path) -> None:
        state = tiny_vit().state_dict()
        state["pos_embed"] = state["pos_embed"][:, :3].clone()
        save_file(state, tmp_path / "b.safetensors")
        with pytest.raises(FusionKitError, match="'pos_embed' has shape"):
            Finetune(tiny_vit(), base=str(tmp_path / "b.safetensors"), private=HEAD)


class TestSave:
    def test_replaces_either_kind_of_fine_tune_and_nothing_else(
        self, lora: Fits, full: Fits, tmp_path: Path
    ) -> None:
        module, whole = lora.modules["digit"], full.modules["digit"]
        module.save(tmp_path / "x")
        with pytest.raises(BundleError, match="exists"):
            module.save(tmp_path / "x")
        assert whole.save(tmp_path / "x", overwrite=True) == tmp_path / "x/model.safetensors"
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["model.safetensors"]
        module.save(tmp_path / "x", overwrite=True)
        assert not (tmp_path / "x/model.safetensors").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("")
        for each in (module, whole):
            with pytest.raises(BundleError, match="not overwritten"):
                each.save(tmp_path / "mine", overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} == {"x", "mine"}

    def test_what_is_saved_does_not_depend_on_mode_or_on_further_use(
        self, linearized: Fits, tmp_path: Path
    ) -> None:
        module = linearized.modules["digit"]
        outputs(module.model)
        module.train()
        again = module.save(tmp_path / "again")
        module.eval()
        first = linearized.paths["digit"]
        for path in first.iterdir():
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name

    def test_images_are_of_every_class(self) -> None:
        """Of the fixtures themselves: comparing outputs on like images would show little."""
        assert images().flatten(1).unique(dim=0).shape[0] > 30


@pytest.mark.parametrize("method", ["lora", "full"])
def test_saved_at_a_url(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever fsspec reaches, and nowhere else; what is there is not written over."""
    pytest.importorskip("upath", reason="pip install '.[test]'")
    monkeypatch.chdir(tmp_path)
    module = Finetune(tiny_vit(), "digit", method, private=HEAD, target_modules=TARGETS, rank=2)
    module.prepare(only(FewDigits(), ["digit"]))
    path = module.save(f"memory://saved/{method}")
    with pytest.raises(BundleError, match="exists"):
        module.save(f"memory://saved/{method}")
    assert not list(tmp_path.iterdir())
    found = Family(tiny_vit(), {"digit": str(path)}, HEAD)
    assert found.tasks == ("digit",)
