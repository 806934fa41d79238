"""Fine-tuning language models: every method, and that PEFT and transformers load its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import trainer
from peft import PeftModel
from safetensors.torch import load_file
from tiny_language import causal, encoder_decoder, jsonl, tokenizer
from torch import Tensor, nn

from fusionkit import Family, Finetune, Mean, ReuseModule
from fusionkit.cli.fit import FitCLI
from fusionkit.errors import FusionKitError
from fusionkit.reuse.fused import Fused
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.linearize import linearize
from fusionkit.tasks.models import causal_lm, seq2seq_lm

ROWS = [
    {"prompt": "the cat", "completion": " sat on the mat"},
    {"prompt": "a dog and the", "completion": " cat ate"},
]
METHODS = ["full", "lora", "linearized_lora", "ia3"]
BASES = {"llama": causal_lm, "t5": seq2seq_lm}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"llama": causal(folder / "llama", layers=2), "t5": encoder_decoder(folder / "t5")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "ant"
    jsonl(folder / "train.jsonl", ROWS * 4)
    jsonl(folder / "test.jsonl", ROWS)
    return folder


def rows_for(base: str, bases: dict[str, Path], rows: Path) -> LanguageData:
    tokens = str(bases[base])
    return LanguageData({"ant": str(rows)}, tokens, encoder_decoder=base == "t5", batch_size=4)


def said(model: Any, data: LanguageData) -> Tensor:
    """The model's outputs on the test rows."""
    (batch,) = data.test_dataloader()[0]
    model.eval()
    with torch.no_grad():
        return data.kinds["ant"].predict(model, batch)


def fitted(base: str, method: Any, bases: Any, data: LanguageData, **settings: Any) -> Finetune:
    model = BASES[base](str(bases[base]), **settings.pop("model", {}))
    options = settings.pop("trainer", {})
    own = {"rank": 2, "learning_rate": 0.02, "dropout": 0.0, **settings}
    module = Finetune(model, method=method, **own)
    trainer(3, **options).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_every_method(
    base: str, method: str, bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    """Layers computed again, gradients of two batches a step; no settings but the base."""
    data = rows_for(base, bases, rows)
    module = fitted(
        base,
        method,
        bases,
        data,
        model={"gradient_checkpointing": True},
        trainer={"accumulate_grad_batches": 2},
    )
    wanted, start = said(module.model, data), said(BASES[base](str(bases[base])), data)
    assert not torch.allclose(wanted, start, atol=1e-2)
    path = module.save(tmp_path / "tuned")
    if method == "full":
        loaded: Any = BASES[base](str(tmp_path / "tuned"))
    elif method == "linearized_lora":
        loaded = None  # PEFT has no such adapter
    else:
        loaded = PeftModel.from_pretrained(BASES[base](str(bases[base])), str(path))
        task_type = "SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM"
        assert json.loads((path / "adapter_config.json").read_text())["task_type"] == task_type
    if loaded is not None:
        torch.testing.assert_close(said(loaded, data), wanted, rtol=1e-4, atol=1e-5)
    reuse = ReuseModule(BASES[base](str(bases[base])))
    reuse.reuse(Family(str(bases[base]), {"ant": path}))
    reuse.switch("ant")
    torch.testing.assert_close(said(reuse.model, data), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_gradient_checkpointing_changes_no_gradient(
    base: str, bases: dict[str, Path], rows: Path
) -> None:
    data = rows_for(base, bases, rows)
    (batch,) = data.test_dataloader()[0]
    kind, found, calls = data.kinds["ant"], [], []
    for checkpointing in (False, True):
        model: Any = BASES[base](str(bases[base]), gradient_checkpointing=checkpointing)
        module = Finetune(model, method="lora", rank=2, dropout=0.0)
        module.prepare(data)
        count: list[None] = []
        layer = next(m for m in module.modules() if type(m).__name__.endswith(("MLP", "LayerFF")))
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(None))
        for parameter in module.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)  # of T5's own dropout
        kind.loss(kind.predict(module.train().model, batch), batch).backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[0], found[1])


def test_in_half_precision_by_a_recipe(bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """Lightning's flags are its own."""
    path = {"path": str(bases["llama"]), "gradient_checkpointing": True}
    base = {"class_path": "fusionkit.tasks.models.causal_lm", "init_args": path}
    data = {"tasks": {"ant": str(rows)}, "tokenizer": str(bases["llama"]), "batch_size": 2}
    recipe = {
        "model": {
            "class_path": "Finetune",
            "init_args": {"model": base, "method": "full", "learning_rate": 0.01},
        },
        "data": {"class_path": "LanguageData", "init_args": data},
        "out": str(tmp_path / "out"),
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(recipe))
    flags = {"accelerator": "cpu", "precision": "bf16-mixed", "accumulate_grad_batches": 2}
    given = [f"--trainer.{name}={value}" for name, value in flags.items()]
    quiet = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    cli = FitCLI([f"--config={tmp_path / 'fit.yaml'}", *given, *quiet])
    cli.fit()
    assert cli.trainer.global_step == 4  # of 7 rows, one is kept for validation
    saved = load_file(tmp_path / "out/finetuned/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out/finetuned")
    own = cli.datamodule
    torch.testing.assert_close(said(loaded, own), said(cli.model.model, own))


class TestAnArchitectureThatPeftDoesNotKnow:
    @pytest.fixture
    def granite(self, tmp_path: Path) -> Path:
        tokens = tokenizer(tmp_path / "granite")
        from transformers import GraniteConfig, GraniteForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokens)}
        GraniteForCausalLM(GraniteConfig(**sizes, **heads)).save_pretrained(tmp_path / "granite")
        return tmp_path / "granite"

    def test_a_lora_adapts_its_linear_layers(
        self, granite: Path, rows: Path, tmp_path: Path
    ) -> None:
        data = LanguageData({"ant": str(rows)}, str(granite))
        module = Finetune(causal_lm(str(granite)), rank=2)
        trainer(1).fit(module, datamodule=data)
        saved = load_file(module.save(tmp_path / "a") / "adapter_model.safetensors")
        adapted = {name.split(".")[-3] for name in saved}
        assert adapted == {f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")}

    def test_ia3_is_to_be_told(self, granite: Path, rows: Path) -> None:
        module = Finetune(causal_lm(str(granite)), method="ia3")
        with pytest.raises(FusionKitError, match="target_modules"):
            module.prepare(LanguageData({"ant": str(rows)}, str(granite)))


class TestLinearized:
    """L-LoRA of a causal model."""

    def test_is_its_first_order(self, bases: dict[str, Path], rows: Path) -> None:
        """Against `torch.func.jvp` of every adapted layer, both factors away from the start."""
        data = rows_for("llama", bases, rows)
        outputs = []
        for method in ("closed_form", "jvp"):
            module = Finetune(causal_lm(str(bases["llama"])), rank=2, dropout=0.0)
            module.prepare(data)
            generator = torch.Generator().manual_seed(0)
            adapter = [p for p in module.model.parameters() if p.requires_grad]
            for parameter in adapter:
                nn.init.normal_(parameter, std=0.5, generator=generator)
            start = said(module.model, data)
            linearize(module.model, method)  # type: ignore[arg-type]
            torch.testing.assert_close(said(module.model, data), start)
            for parameter in adapter:
                nn.init.normal_(parameter, std=0.5, generator=generator)
            outputs.append(said(module.model, data))
        assert not torch.allclose(outputs[0], start, atol=0.1)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)

    def test_two_tasks_are_fused(self, bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
        """The mean of two adapters is that of their factors B: the start is one, and so is A."""
        data = rows_for("llama", bases, rows)
        modules = [
            fitted("llama", "linearized_lora", bases, data, learning_rate=rate)
            for rate in (0.1, 0.01)
        ]
        paths = {f"t{i}": module.save(tmp_path / f"t{i}") for i, module in enumerate(modules)}
        family = Family(str(bases["llama"]), paths, adapters="modules")
        reuse = ReuseModule(causal_lm(str(bases["llama"])))
        reuse.reuse(Fused(family, Mean()))
        reuse.switch("t0")
        with torch.no_grad():
            pairs = zip(modules[0].parameters(), modules[1].parameters(), strict=True)
            for own, other in pairs:
                if own.requires_grad:
                    own.copy_((own + other) / 2)
        found, wanted = said(reuse.model, data), said(modules[0].model, data)
        assert not torch.allclose(wanted, said(modules[1].model, data), atol=1e-2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_classifiers_folder_says_its_classes(tmp_path: Path) -> None:
    """Where the task's head is another than the base's."""
    from tiny_tasks import Rows
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 11}
    base = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **sizes))
    data = Rows()
    task = data.tasks[0]
    module = Finetune(base, task, "full", private=["classifier.*"])
    from fusionkit.tasks.only import only

    data.num_classes = {task: 5}
    module.prepare(only(data, [task]))
    module.save(tmp_path / "tuned")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(loaded.classifier.weight, module.model.get_parameter("classifier.weight"))
    assert loaded.classifier.weight.shape == (5, 8)
