"""Adapters that are not read: refused by their own names, with a mend that works, or none."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import net

from fusionkit import Dense, Family
from fusionkit.bundles.compress import compress
from fusionkit.errors import CheckpointError


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


MERGED = {
    "AdaLoRA": (peft.AdaLoraConfig(target_modules=["1"], total_step=10), "an AdaLoRA .*ADALORA"),
    "BOFT": (peft.BOFTConfig(target_modules=["1"], boft_block_size=4), "a BOFT .*BOFT"),
    "LN": (peft.LNTuningConfig(target_modules=["norm"]), "of type LN_TUNING"),
    "LoHa": (peft.LoHaConfig(target_modules=["1"]), "a LoHa .*LOHA"),
    "LoKr": (peft.LoKrConfig(target_modules=["1"]), "a LoKr .*LOKR"),
    "OFT": (peft.OFTConfig(target_modules=["1"], oft_block_size=4, r=0), "an OFT .*OFT"),
    "VeRA": (peft.VeraConfig(target_modules=["1"]), "a VeRA .*VERA"),
    "tokens": (
        peft.LoraConfig(target_modules=["1"], trainable_token_indices={"embed": [1]}),
        "trainable_token_indices",
    ),
    "tokens alone": (
        peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[1]),
        "trained rows of an embedding",
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_what_peft_can_merge(name: str, tmp_path: Path) -> None:
    """The mend is followed: the merged model is read, and is what PEFT made."""
    config, said = MERGED[name]
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    expected = rf"(?s){tmp_path}.*{said}.*merge it into its base with PEFT \(merge_and_unload"
    with pytest.raises(CheckpointError, match=expected):
        Family(net(), {"t": str(tmp_path)}, private=["*"])
    merged = model.merge_and_unload()
    bundle = compress(net(), {"t": merged}, Dense("fp32"))
    changed = 0
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(bundle.state_dict("t")[key], tensor)
        changed += not torch.equal(tensor, net().state_dict()[key])
    assert changed


NOT_MERGED = {
    "prompt": (peft.PromptTuningConfig(), "prompt tuning .*no change of weights"),
    "prefix": (peft.PrefixTuningConfig(), "prefix tuning .*no change of weights"),
    "p-tuning": (peft.PromptEncoderConfig(), "p-tuning .*no change of weights"),
    "X-LoRA": (
        peft.XLoraConfig(hidden_size=8, adapters={"a": "a"}),
        "an X-LoRA .*depends on the inputs",
    ),
    "aLoRA": (
        peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
        "alora_invocation_tokens.*depends on the inputs",
    ),
    "QA-LoRA": (peft.LoraConfig(use_qalora=True), "use_qalora.*PEFT itself can't merge it"),
    "replication": (
        peft.LoraConfig(layer_replication=[(0, 2), (1, 3)]),
        "layer_replication.*no fine-tune of this base",
    ),
}


@pytest.mark.parametrize("name", NOT_MERGED)
def test_what_nobody_can_merge(name: str, tmp_path: Path) -> None:
    """No word of merging where there is no change of weights, nor one that PEFT makes."""
    config, said = NOT_MERGED[name]
    config.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"(?s){tmp_path}.*{said}") as error:
        Family(net(), {"t": str(tmp_path)})
    assert "merge it into its base" not in str(error.value)


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "pissa_niter_16", "mica"])
def test_starts_that_change_the_base(start: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    said = rf"(?s){tmp_path}.*{re.escape(start)}.*path_initial_model_for_weight_conversion"
    with pytest.raises(CheckpointError, match=said):
        Family(net(), {"t": str(tmp_path)})


def test_what_no_one_knows_yet(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOVEL"}')
    with pytest.raises(CheckpointError, match="an adapter of type NOVEL"):
        Family(net(), {"t": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_novelty": 3}')
    with pytest.raises(CheckpointError, match=r"(?s)not known here.*use_novelty: 3"):
        Family(net(), {"t": str(tmp_path)})


@pytest.mark.parametrize("start", ["eva", "orthogonal", "gaussian"])
def test_starts_that_leave_the_base_are_plain(start: Any, tmp_path: Path) -> None:
    """As saved, whatever the config says of how they were found."""
    config = peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=start)
    model: Any = peft.get_peft_model(net(), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    ours = Family(net(), {"t": str(tmp_path)}).finetuned["t"]
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
