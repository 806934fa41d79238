"""Which models can be served, and for what."""

from pathlib import Path
from typing import Any

import pytest
import talking
import torch
import transformers
from vocabularies import MODELS

from fusionkit.errors import FusionKitError
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.serving.calls import Calls
from fusionkit.serving.model import kind_of
from fusionkit.serving.work import Tally


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=28, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    return transformers.MambaForCausalLM(config)


def test_what_models_are_for() -> None:
    assert kind_of(MODELS["gpt2"]()) == "generation"
    config = MODELS["bert, tied"]().config
    assert kind_of(transformers.BertForSequenceClassification(config)) == "classification"
    assert kind_of(torch.nn.Linear(2, 3)) == "classification"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (MODELS["t5"], r"T5ForConditionalGeneration is an encoder-decoder, .*fusionkit generate"),
        (MODELS["bert, tied"], r"BertForMaskedLM neither generates text nor classifies rows"),
        (mamba, r"MambaForCausalLM keeps more than keys and values .*LinearAttentionLayer"),
    ],
)
def test_what_can_not_be_served(made: Any, said: str) -> None:
    with pytest.raises(FusionKitError, match=said):
        kind_of(made())


def test_a_model_that_minds_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not mask what is padded, say."""
    bundle = talking.bundle("llama, tied", tmp_path)
    model: Any = talking.models_of("llama, tied")["base"]
    Calls(model, MixedBatch(model, bundle), Tally()).check()
    forward = model.forward

    def deaf(attention_mask: Any = None, cache: Any = None, **settings: Any) -> Any:
        return forward(cache=cache, **settings)

    monkeypatch.setattr(model, "forward", deaf)
    calls = Calls(model, MixedBatch(model, bundle), Tally())
    with pytest.raises(
        FusionKitError, match=r"answers a row otherwise in a batch .*logits are off"
    ):
        calls.check()
