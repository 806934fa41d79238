"""Language models in two: what comes of some tokens at a time is what the whole model says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import QUESTION, causal, jsonl
from torch import Tensor, nn

from fusionkit.tasks import split_model
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.language_modeling import LanguageModeling, TextToText
from fusionkit.tasks.models import causal_lm
from fusionkit.tasks.reweighted import Reweighted
from fusionkit.tasks.split_model import SplitModel

WORDS = 300
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
OTHERS = {"gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8}, "cohere": {"logit_scale": 0.3},
          "granite": {"logits_scaling": 3.0}, "llama": {"tie_word_embeddings": True},
          "opt": {"word_embed_proj_dim": 8, "ffn_dim": 32}, "gpt2": {"n_embd": 16, "n_head": 2},
          "mixtral": {"num_local_experts": 2}, "gpt_neox": {}}  # fmt: skip
DECODERS = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}  # fmt: skip


def made(kind: str, **settings: Any) -> Any:
    """One of transformers' models, its head's extras at work."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    decodes = kind in DECODERS
    sizes = {**DECODERS[kind], "vocab_size": WORDS} if decodes else {**SIZES, **OTHERS[kind]}
    config = AutoConfig.for_model(kind, **{"decoder_start_token_id": 0, **sizes, **settings})
    torch.manual_seed(0)
    model = (AutoModelForSeq2SeqLM if decodes else AutoModelForCausalLM).from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind == "bart":
        model.final_logits_bias.normal_()
    return model.eval()


def batch_of(kind: str) -> tuple[LanguageModeling, dict[str, Tensor]]:
    """Rows of unlike lengths, of whose tokens some count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.where(mask.bool(), -100)
    labels[0, :4] = -100
    decodes = kind in DECODERS
    if decodes:
        labels = labels[:, 2:].contiguous()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "bytes": torch.ones(3)}
    return (TextToText() if decodes else LanguageModeling()), batch


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, no model is split."""
    monkeypatch.setattr(SplitModel, "of", lambda _: None)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_model, "PIECE", 4 * WORDS)


@pytest.mark.parametrize("name", [*OTHERS, *DECODERS])
class TestAsTheWholeModel:
    """Loss, divergence, scores, draws; and gradients, of heads that do more than multiply."""

    def test_values(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, (kind, batch) = made(name), batch_of(name)
        teacher = made(name)
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.2)
        assert SplitModel.of(model)
        found = []
        for _ in range(2):
            with torch.no_grad():
                kept = kind.kept(teacher, batch)
                found.append(
                    {
                        "loss": kind.loss_of(model, batch),
                        "distance": kind.distance(model, batch, kept, teacher),
                        "scores": kind.answers(model, batch),
                    }
                )
            whole(monkeypatch)
        assert kept.shape[-1] == WORDS
        assert float(found[0]["distance"]) > 1e-3
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)

    def test_gradients(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the weights in place of a model's own, tied ones too."""
        model, teacher, (kind, batch) = made(name), made(name), batch_of(name)
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.2)
        found = []
        for _ in range(2):
            leaves = {n: (p * 0.9).detach().requires_grad_() for n, p in model.named_parameters()}
            student = Reweighted(model, leaves)
            with torch.no_grad():
                kept = kind.kept(teacher, batch)
            total = kind.loss_of(student, batch) + kind.distance(student, batch, kept, teacher)
            total.backward()
            found.append({n: leaf.grad for n, leaf in leaves.items()})
            whole(monkeypatch)
        assert any(g is not None and g.any() for g in found[0].values())
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_never_more_logits_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of student and teacher, on the way there and on the way back; the layers run once."""
    model, teacher, (kind, batch) = made("llama"), made("llama"), batch_of("llama")
    sizes: list[int] = []
    layers: list[None] = []
    for each in (model, teacher):
        each.lm_head.register_forward_hook(lambda *a: sizes.append(a[-1].shape[-2]))
        each.model.layers[0].register_forward_hook(lambda *_: layers.append(None))
    kept = kind.kept(teacher, batch).detach()
    kind.distance(model, batch, kept, teacher).backward()  # type: ignore[no-untyped-call]
    count = int((kind.targets(batch) != -100).sum())
    assert kept.shape == (count, 16)
    assert max(sizes) == 4
    assert sum(sizes) == 4 * count  # of both, twice
    assert len(layers) == 2


def test_draws_are_those_of_the_whole_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tokens count, of a vocabulary of whole blocks of draws."""
    monkeypatch.setattr(split_model, "PIECE", 4 * 304)
    model = made("llama", vocab_size=304)
    ids = torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = []
    for _ in range(2):
        said = LanguageModeling().drawn(model, batch)
        generator = torch.Generator().manual_seed(3)
        for again in (True, False):
            said(generator).backward(retain_graph=again)  # type: ignore[no-untyped-call]
        found.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
        whole(monkeypatch)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = causal(tmp_path / "llama")
    others = {"prompt": "the", "choices": [" cat", " dog sat on the log", " hat."], "answer": 0}
    rows = LanguageData({"q": str(jsonl(tmp_path / "q.jsonl", [QUESTION, others]))}, str(folder))
    (batch,) = rows.test_dataloader()[0]
    model, kind, found = causal_lm(str(folder)), rows.kinds["q"], []
    for _ in range(2):
        model.zero_grad()
        said = kind.predict(model, batch)
        kind.loss(said, batch).backward()  # type: ignore[no-untyped-call]
        found.append([said, *(p.grad for p in model.parameters())])
        whole(monkeypatch)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_what_is_left_whole(tmp_path: Path) -> None:
    """What is no model of transformers, or has no such head, or must not be left half-way."""
    from transformers import LlamaModel

    model = made("llama")
    assert SplitModel.of(model)
    assert SplitModel.of(Reweighted(model))
    assert SplitModel.of(nn.Linear(2, 2)) is None
    assert SplitModel.of(lambda **_: None) is None
    assert SplitModel.of(LlamaModel(model.config)) is None
    compiled: Any = torch.compile(model)
    assert SplitModel.of(compiled) is None
    own = model.model.forward
    model.model.forward = own  # as accelerate does
    assert SplitModel.of(model) is None
    del model.model.forward
    with pytest.raises(TypeError):
        model(nothing=1, input_ids="x")
    states = SplitModel.of(model).states(input_ids=torch.tensor([[3, 4]]))  # type: ignore[union-attr]
    assert states.shape == (1, 2, 16)
    assert not model.model._forward_hooks
    assert "forward" not in vars(model.model)
