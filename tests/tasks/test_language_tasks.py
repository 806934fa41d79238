"""Language modelling, multiple choice and generation: their values, and what runs them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import ANSWERED, QUESTION, TEXT, causal, data, encoder_decoder, jsonl
from tiny_tasks import trainer

import fusionkit
from fusionkit import DBMS, Calibration, Finetune, MagnitudePrune, ReuseModule
from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.generation import Generation
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.language_modeling import LanguageModeling, TextToText
from fusionkit.tasks.models import causal_lm, seq2seq_lm

PROMPTS = ["the cat", "the dog sat on the", "a", "on the mat. the cat and", "hat", "ate the hat. a"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return causal(tmp_path / "llama")


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    return encoder_decoder(tmp_path / "t5")


def tuned(model: Any, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """A fine-tuned model: every matrix a little off."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def scores(model: Any, rows: Any, states: Any = None, **settings: Any) -> Any:
    """Scores of the same fine-tune for each task."""
    state = states or tuned(model)
    finetuned: Any = dict.fromkeys(rows.tasks, state)
    module = ReuseModule(model, finetuned=finetuned, **settings)
    trainer().test(module, rows, verbose=False)
    assert module.scores
    return module.scores


def nats(model: Any, ids: list[int], first: int = 1) -> float:
    """−ln p of the tokens from `first` on, by hand."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[place - 1, ids[place]]) for place in range(first, len(ids)))


class TestLanguageModeling:
    def test_by_hand(self, tmp_path: Path, llama: Path) -> None:
        """Two texts of unlike lengths in one padded batch."""
        texts = ["the cat sat", TEXT[:60]]
        path = jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
        rows = LanguageData({"t": str(path)}, str(llama), packed=False)
        model: Any = causal_lm(str(llama))
        state = tuned(model)
        metric = {"metrics": ["BitsPerByte", "Perplexity", "TokenAccuracy"]}
        found = scores(model, rows, state, metric={**metric, "counts": "BitsPerByte"})
        model.load_state_dict(state)
        ids = [[*rows.tokenizer(text)["input_ids"], 2] for text in texts]
        total = sum(nats(model, each) for each in ids)
        size = sum(len(text.encode()) for text in texts)
        assert found.values["t"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
        others = found.of("t").others
        count = sum(len(each) - 1 for each in ids)
        assert others["Perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        right = sum(
            int((model(input_ids=torch.tensor([e])).logits[0, :-1].argmax(-1) == t).sum())
            for e in ids
            for t in [torch.tensor(e[1:])]
        )
        assert others["TokenAccuracy"] == pytest.approx(right / count)
        assert found.of("t").lower
        rows_own = found.of("t").row_scores
        assert rows_own is not None
        assert float(rows_own.mean()) == pytest.approx(found.values["t"], rel=1e-5)

    def test_an_answer_alone(self, tmp_path: Path, llama: Path) -> None:
        rows = LanguageData({"a": str(jsonl(tmp_path / "a.jsonl", [ANSWERED]))}, str(llama))
        model: Any = causal_lm(str(llama))
        state = tuned(model)
        found = scores(model, rows, state)
        model.load_state_dict(state)
        first = len(rows.tokenizer("the cat")["input_ids"])
        ids = [*rows.tokenizer("the cat sat")["input_ids"], 2]
        assert found.values["a"] == pytest.approx(nats(model, ids, first) / math.log(2) / 4)

    def test_loss_and_divergence(self, tmp_path: Path, llama: Path) -> None:
        """What does not count moves neither; the loss is transformers' own."""
        asked = [{"prompt": p, "completion": " sat"} for p in PROMPTS]
        rows = data(tmp_path, jsonl(tmp_path / "a.jsonl", asked))
        (batch,) = rows.test_dataloader()[0]
        model: Any = causal_lm(str(llama))
        kind = LanguageModeling()
        said = kind.predict(model, batch)
        names = ("input_ids", "attention_mask", "labels")
        theirs = model(**{name: batch[name] for name in names}).loss
        torch.testing.assert_close(kind.loss(said, batch), theirs)
        assert float(kind.divergence(said, said)) == 0
        counted = kind.targets(batch) != -100
        other = torch.randn_like(said).where(counted[..., None], 0)
        ours, wanted = other[counted].log_softmax(-1), said[counted].log_softmax(-1)
        by_hand = (wanted.exp() * (wanted - ours)).sum(-1).mean()
        torch.testing.assert_close(kind.divergence(other, said), by_hand)

    def test_a_metric_of_something_else(self, tmp_path: Path, llama: Path) -> None:
        rows = LanguageData({"a": str(jsonl(tmp_path / "a.jsonl", [ANSWERED]))}, str(llama))
        with pytest.raises(FusionKitError, match=r"expected one of BitsPerByte, Perplexity, Tok"):
            scores(causal_lm(str(llama)), rows, metric="MeanSquaredError")
        with pytest.raises(FusionKitError, match=r"no metric 'BitsPerBite'.*BitsPerByte"):
            scores(causal_lm(str(llama)), rows, metric="BitsPerBite")


class TestMultipleChoice:
    ROWS = (
        QUESTION,
        {"prompt": "the", "choices": [" cat", " dog sat on the log", " hat."], "answer": 0},
        {"prompt": "a dog and a", "choices": [" log", " mat"], "answer": " mat"},
    )

    def test_by_hand(self, tmp_path: Path, llama: Path) -> None:
        """Rows of two and of three choices in one batch."""
        rows = LanguageData({"q": str(jsonl(tmp_path / "q.jsonl", self.ROWS))}, str(llama))
        model: Any = causal_lm(str(llama))
        (batch,) = rows.test_dataloader()[0]
        with torch.no_grad():
            found = rows.kinds["q"].predict(model, batch)
        by_prompt = {
            len(rows.tokenizer(row["prompt"])["input_ids"]): row  # type: ignore[arg-type]
            for row in self.ROWS
        }
        assert len(by_prompt) == 3
        for place in range(3):
            first = int((batch["answers"][place, 0] != -100).int().argmax())
            row: Any = by_prompt[first]
            ids = [[*rows.tokenizer(row["prompt"] + c)["input_ids"], 2] for c in row["choices"]]
            wanted = [-nats(model, each, first) for each in ids]
            torch.testing.assert_close(found[place, : len(wanted)], torch.tensor(wanted))
            assert (found[place, len(wanted) :] < -1e6).all()

    def test_by_length(self, tmp_path: Path, llama: Path) -> None:
        rows = LanguageData({"q": str(jsonl(tmp_path / "q.jsonl", self.ROWS))}, str(llama))
        model: Any = causal_lm(str(llama))
        state = tuned(model)
        metric = {
            "metrics": {
                "raw": "Accuracy",
                "bytes": "NormalizedAccuracy",
                "tokens": {"class_path": "NormalizedAccuracy", "init_args": {"by": "tokens"}},
            },
            "counts": "bytes",
        }
        found = scores(model, rows, state, metric=metric)
        model.load_state_dict(state)
        (batch,) = rows.test_dataloader()[0]
        with torch.no_grad():
            said = rows.kinds["q"].predict(model, batch)
        for name, score in {"bytes": found.values["q"], **found.of("q").others}.items():
            sizes = 1.0 if name == "raw" else batch[name]
            right = ((said / sizes).argmax(-1) == batch["labels"]).float().mean()
            assert score == pytest.approx(float(right))
        assert found.of("q").row_scores is not None

    def test_gradients_are_finite_with_empty_choices(self, tmp_path: Path, llama: Path) -> None:
        rows = data(tmp_path, jsonl(tmp_path / "q.jsonl", self.ROWS))
        (batch,) = rows.test_dataloader()[0]
        kind, model = rows.kinds["q"], causal_lm(str(llama))
        said = kind.predict(model, batch)
        loss = kind.loss(said, batch) + kind.divergence(said, said.detach() / 2)
        loss.backward()  # type: ignore[no-untyped-call]
        assert math.isfinite(float(loss))
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class TestGeneration:
    def generated(self, folder: Path, model: Any, path: Path, size: int, **more: Any) -> list[Any]:
        settings: Any = {"generate": True, "generation": {"max_new_tokens": 12}, **more}
        rows = LanguageData({"a": str(path)}, str(folder), batch_size=size, **settings)
        kind: Any = rows.kinds["a"]
        found = []
        for batch in rows.test_dataloader()[0]:
            with torch.no_grad():
                said = kind.answers(model, batch)
            found += [[t for t in row if t not in {0, 2}] for row in said.tolist()]
        return found

    def prompts(self, folder: Path) -> Path:
        return jsonl(folder / "a.jsonl", [{"prompt": p, "completion": "x"} for p in PROMPTS])

    def test_batched_is_one_by_one(self, tmp_path: Path, llama: Path) -> None:
        """Prompts of unlike lengths, padded on the left: token for token as each by itself."""
        path, model = self.prompts(tmp_path), causal_lm(str(llama))
        alone = self.generated(llama, model, path, 1)
        assert self.generated(llama, model, path, 6) == alone
        assert len({tuple(each) for each in alone}) == len(PROMPTS)

    def test_learned_positions(self, tmp_path: Path) -> None:
        """A model whose positions are no rotations, and would feel the padding."""
        folder = causal(tmp_path / "gpt2")
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes: Any = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48}
        config = GPT2Config(vocab_size=300, bos_token_id=1, eos_token_id=2, **sizes)
        GPT2LMHeadModel(config).save_pretrained(folder)
        path, model = self.prompts(tmp_path), causal_lm(str(folder))
        assert self.generated(folder, model, path, 6) == self.generated(folder, model, path, 1)

    def test_encoder_decoder(self, tmp_path: Path, t5: Path) -> None:
        path, model = self.prompts(tmp_path), seq2seq_lm(str(t5))
        settings: Any = {"encoder_decoder": True}
        alone = self.generated(t5, model, path, 1, **settings)
        assert self.generated(t5, model, path, 6, **settings) == alone

    def test_scored(self, tmp_path: Path, llama: Path) -> None:
        """A row whose reference is what the model says is right, and the others are not."""
        model: Any = causal_lm(str(llama))
        state = tuned(model)
        model.load_state_dict(state)
        path = self.prompts(tmp_path)
        said = self.generated(llama, model, path, 6)
        settings: Any = {"generate": ["a"], "generation": {"max_new_tokens": 12}}
        rows = LanguageData({"a": str(path)}, str(llama), **settings)
        ordered = [row["prompts"] for row in rows.test_dataloader()[0].dataset]
        prompts = [rows.tokenizer.decode(p, skip_special_tokens=True) for p in ordered]
        asked = [
            {"prompt": p, "completion": rows.tokenizer.decode(t) if place % 2 else "no"}
            for place, (p, t) in enumerate(zip(prompts, said, strict=True))
        ]
        path = jsonl(tmp_path / "b.jsonl", asked)
        rows = LanguageData({"b": str(path)}, str(llama), **{**settings, "generate": ["b"]})
        metrics = ["ExactMatch", "WordF1", "Rouge", "CHRFScore", "WordErrorRate"]
        metric = {"metrics": metrics, "counts": "ExactMatch"}
        base = causal_lm(str(llama))
        found = scores(base, rows, state, metric=metric)
        assert found.values["b"] == pytest.approx(0.5)
        own = found.of("b").row_scores
        assert own is not None
        assert sorted(own.tolist()) == [0, 0, 0, 1, 1, 1]
        assert all(math.isfinite(value) for value in found.of("b").others.values())
        assert found.of("b").others["CHRFScore"] > 0.3

    def test_fewer_rows_keep_their_references(self, tmp_path: Path, llama: Path) -> None:
        rows = LanguageData(
            {"a": str(self.prompts(tmp_path))}, str(llama), generate=True, max_length=80
        )
        (batch,) = rows.test_dataloader()[0]
        kind = rows.kinds["a"]
        first = kind.first(batch, 2)
        assert kind.count(first) == 2
        assert len(first["references"]) == len(first["prompts_mask"]) == 2

    def test_a_model_that_can_not(self, tmp_path: Path, llama: Path) -> None:
        path = self.prompts(tmp_path)
        with pytest.raises(FusionKitError, match="Linear can't generate: it is no causal"):
            self.generated(llama, torch.nn.Linear(1, 1), path, 1)

    def test_more_than_the_context(self, tmp_path: Path, llama: Path) -> None:
        path = self.prompts(tmp_path)
        model = causal_lm(str(llama))
        more: Any = {"generation": {"max_new_tokens": 47}, "max_length": 80}
        with pytest.raises(DataError, match=r"prompt of \d+ tokens and 47 new ones .* context, 48"):
            self.generated(llama, model, path, 1, **more)


class TestTextToText:
    def test_by_hand(self, tmp_path: Path, t5: Path) -> None:
        asked = [ANSWERED, {"prompt": "a dog", "completion": " sat on the log"}]
        path = jsonl(tmp_path / "a.jsonl", asked)
        rows = LanguageData({"a": str(path)}, str(t5), encoder_decoder=True)
        (batch,) = rows.test_dataloader()[0]
        model: Any = seq2seq_lm(str(t5))
        kind = rows.kinds["a"]
        assert kind == TextToText()
        said = kind.predict(model, batch)
        names = ("input_ids", "attention_mask", "labels")
        theirs = model(**{name: batch[name] for name in names}).loss
        torch.testing.assert_close(kind.loss(said, batch), theirs)
        assert math.isfinite(scores(model, rows).values["a"])


class TestEverythingElse:
    """Fine-tuning and calibration know nothing of language, and do both."""

    def test_fine_tuned(self, tmp_path: Path, llama: Path) -> None:
        folder = tmp_path / "t"
        for split in ("train", "test"):
            jsonl(folder / f"{split}.jsonl", [{"prompt": p, "completion": " sat"} for p in PROMPTS])
        settings: Any = {"generation": {"max_new_tokens": 8}, "val_fraction": 0.0}
        rows = LanguageData({"t": str(folder)}, str(llama), generate=True, **settings)
        module = Finetune(causal_lm(str(llama)), "t", "full", learning_rate=1e-2)
        trainer(40).fit(module, rows)
        model = module.model.eval()
        kind: Any = rows.kinds["t"]
        (batch,) = rows.test_dataloader()[0]
        assert isinstance(kind, Generation)
        assert kind.texts(kind.answers(model, batch)) == ["sat"] * len(PROMPTS)

    @pytest.mark.parametrize("row", [ANSWERED, QUESTION])
    def test_calibrated(self, tmp_path: Path, llama: Path, row: Any) -> None:
        folder = tmp_path / "t"
        for split in ("train", "test"):
            jsonl(folder / f"{split}.jsonl", [{**row, "prompt": p} for p in PROMPTS])
        rows = LanguageData({"t": str(folder)}, str(llama), val_fraction=0)
        model = causal_lm(str(llama))
        finetuned: Any = {"t": tuned(model)}
        module = ReuseModule(model, finetuned=finetuned, codec=DBMS(MagnitudePrune(0.3)))
        run = trainer(8)
        bundle = fusionkit.calibrate(module, rows, settings=Calibration(rows=6), trainer=run)
        learned = bundle.manifest.tasks["t"].calibration
        assert learned
        assert learned.loss_after < learned.loss_before
