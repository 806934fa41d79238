"""Calibration of language models: what is learned by some tokens' logits at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import causal, encoder_decoder, jsonl
from tiny_tasks import trainer

import fusionkit
from fusionkit import DBMS, Calibration, MagnitudePrune, ReuseModule, Sketch
from fusionkit.tasks import split_model
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.models import causal_lm, seq2seq_lm
from fusionkit.tasks.split_model import SplitModel

TEXTS = [{"text": f"the {a} sat on the {b}. a {b} ate"} for a in ("cat", "dog", "hat", "mat")
         for b in ("log", "cat")]  # fmt: skip
ASKED = [{"prompt": f"the {a}", "completion": " sat on the mat"} for a in ("cat", "dog", "log")]
BASES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "t5": {},
}


def calibrated(base: str, codec: Any, folder: Path) -> list[float]:
    """The losses before and after, task by task."""
    decodes = base == "t5"
    model: Any = (seq2seq_lm if decodes else causal_lm)(str(folder / base))
    finetuned: dict[str, Any] = {}
    for place, task in enumerate(("texts", "asked")[decodes:]):
        generator = torch.Generator().manual_seed(place)
        finetuned[task] = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in model.state_dict().items()
        }
        for alias, name in getattr(model, "all_tied_weights_keys", {}).items():
            finetuned[task][alias] = finetuned[task][name]
    tasks = {task: str(folder / task) for task in finetuned}
    rows = LanguageData(tasks, str(folder / base), encoder_decoder=decodes, batch_size=4)
    reuse = ReuseModule(model, finetuned=finetuned, codec=codec)
    bundle = fusionkit.calibrate(reuse, rows, settings=Calibration(rows=6), trainer=trainer(7))
    found: list[float] = []
    for record in bundle.manifest.tasks.values():
        assert record.calibration
        found += [record.calibration.loss_before, record.calibration.loss_after]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task, rows in (("texts", TEXTS), ("asked", ASKED * 3)):
        for split in ("train", "test"):
            jsonl(tmp_path / task / f"{split}.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "codec", [DBMS(MagnitudePrune(0.2)), Sketch(bits=6)], ids=["DBMS", "gains"]
)
def test_is_what_the_whole_logits_give(
    base: str, codec: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if base == "t5":
        encoder_decoder(folder / base)
    else:
        causal(folder / base, layers=2, **BASES[base])
    monkeypatch.setattr(split_model, "PIECE", 5 * 300)
    said: list[int] = []
    logits = SplitModel.logits
    monkeypatch.setattr(
        SplitModel, "logits", lambda own, states: said.append(len(states)) or logits(own, states)
    )
    found = calibrated(base, codec, folder)
    assert max(said) == 5
    monkeypatch.setattr(SplitModel, "of", lambda _: None)
    wanted = calibrated(base, codec, folder)
    assert wanted[1] < wanted[0]
    # What a Sketch is told of directions comes of other draws, where rows are padded.
    tolerance = 1e-3 if isinstance(codec, DBMS) else 0.2
    assert found == pytest.approx(wanted, rel=tolerance)
