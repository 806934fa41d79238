"""Tasks of lm-eval: its own figures, to the last digit, in FusionKit's tables."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import KINDS, choices, exported, generated, group, offline, own_figures, rolling
from processes import together
from program import run
from tiny_language import CHAT, causal, encoder_decoder
from torch import nn

import fusionkit
from fusionkit import SVD, Bundle, ReuseModule
from fusionkit.cli.compare import compare
from fusionkit.cli.test import evaluate, plain_trainer
from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.lm_eval import LMEval
from fusionkit.tasks.models import causal_lm, seq2seq_lm, sequence_classifier
from fusionkit.tasks.scores import Scores

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install .[harness]")
pytestmark = pytest.mark.usefixtures("offline")
_ = offline  # a fixture
NAMES = ("one", "two")


def tuned(folder: Path, base: Path, seed: int, kind: Any = causal_lm) -> Path:
    model = kind(str(base))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


class Family:
    """A tiny base, its fine-tuned models, and a bundle of them."""

    def __init__(self, folder: Path, chat: str | None = None) -> None:
        self.folder, self.base = folder, causal(folder / "base", chat)
        self.models = {
            name: str(tuned(folder / name, self.base, seed)) for seed, name in enumerate(NAMES)
        }
        self.bundle: Bundle = fusionkit.compress(
            str(self.base), self.models, SVD(4), folder / "bundle"
        )

    def module(self, **settings: Any) -> ReuseModule:
        return ReuseModule(causal_lm(str(self.base)), self.bundle, **settings)

    def scores(self, tasks: Any, module: ReuseModule | None = None, **settings: Any) -> Scores:
        return scored(module or self.module(), tasks, **settings)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def scored(module: ReuseModule, tasks: Any, metric: Any = None, **settings: Any) -> Scores:
    if not isinstance(tasks, Mapping):
        tasks = dict.fromkeys(NAMES, str(tasks))
    module.metric = metric
    return evaluate(module, LMEval(tasks, **settings), plain_trainer(accelerator="cpu"))


def figures(scores: Scores, task: str) -> dict[str, float]:
    measured = scores.of(task)
    return {measured.facts.name: scores.values[task], **measured.others}


def known_scores_of(folder: Path) -> dict[str, float]:
    tasks = json.loads((folder / "scores.json").read_text())["tasks"]
    return {task: each["score"] for task, each in tasks.items()}


class TestFigures:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_lm_evals_own_on_the_exported_models(self, kind: str, family: Family) -> None:
        path = KINDS[kind](family.folder / f"{kind}.yaml")
        scores = family.scores(path)
        for name in NAMES:
            folder = exported(family.bundle, name, family.folder / "exported" / name)
            assert figures(scores, name) == own_figures(folder, path)
        assert figures(scores, "one") != figures(scores, "two") or kind == "generated"

    def test_with_its_settings(self, family: Family) -> None:
        path = choices(family.folder / "few.yaml", fewshot_split="test")
        settings: dict[str, Any] = {"num_fewshot": 1, "limit": 7, "batch_size": 3}
        scores = family.scores(path, **settings)
        again = family.scores(path, **settings)
        folder = exported(family.bundle, "two", family.folder / "exported")
        assert figures(scores, "two") == own_figures(folder, path, **settings)
        assert figures(again, "two") == figures(scores, "two")
        assert scores.of("two").rows == 7
        assert scores.limit == "limit=7"
        assert figures(family.scores(path, limit=7), "two") != figures(scores, "two")

    def test_as_a_conversation(self, tmp_path: Path) -> None:
        family = Family(tmp_path, CHAT)
        path = choices(tmp_path / "chat.yaml")
        settings: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "the cat"}
        folder = exported(family.bundle, "one", tmp_path / "exported")
        scores = family.scores(path, **settings)
        assert figures(scores, "one") == own_figures(folder, path, **settings)
        assert figures(scores, "one") != figures(family.scores(path), "one")

    def test_of_an_encoder_decoder(self, tmp_path: Path) -> None:
        base = encoder_decoder(tmp_path / "base")
        models = {"one": str(tuned(tmp_path / "one", base, 0, seq2seq_lm))}
        bundle = fusionkit.compress(str(base), models, SVD(4), tmp_path / "bundle")
        path = choices(tmp_path / "asked.yaml")
        scores = scored(ReuseModule(seq2seq_lm(str(base)), bundle), {"one": str(path)})
        folder = exported(bundle, "one", tmp_path / "exported")
        assert figures(scores, "one") == own_figures(folder, path)

    def test_of_a_task_with_a_head_of_its_own_where_the_bases_is_tied(self, tmp_path: Path) -> None:
        base = causal(tmp_path / "base", tie_word_embeddings=True)
        model: Any = causal_lm(str(base))
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach().flip(0))
        model.save_pretrained(tmp_path / "one")
        finetuned = {"one": str(tmp_path / "one"), "two": str(tuned(tmp_path / "two", base, 1))}
        module = ReuseModule(causal_lm(str(base)), finetuned=dict(finetuned))
        path = choices(tmp_path / "asked.yaml")
        scores = scored(module, path)
        (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "one" / "tokenizer.json")
        (tmp_path / "base" / "tokenizer_config.json").rename(
            tmp_path / "one" / "tokenizer_config.json"
        )
        assert figures(scores, "one") == own_figures(tmp_path / "one", path)


class TestTables:
    def test_metrics_are_called_as_lm_eval_calls_them(self, family: Family) -> None:
        tasks = {"one": str(choices(family.folder / "c.yaml"))}
        tasks["two"] = str(rolling(family.folder / "r.yaml"))
        scores = family.scores(tasks)
        one, two = scores.of("one"), scores.of("two")
        assert one.facts.name == "acc"
        others = ["acc_stderr", "acc_norm", "acc_norm_stderr", "brier_score"]
        assert list(one.others) == others
        assert one.facts.percent
        assert (one.facts.higher_is_better, two.facts.higher_is_better) == (True, False)
        assert (two.facts.name, list(two.others)) == ("bits_per_byte", ["word_perplexity"])
        assert (one.rows, two.rows) == (25, 3)
        assert one.row_scores is not None
        assert float(one.row_scores.mean()) == pytest.approx(scores.values["one"])
        assert two.row_scores is None

    def test_another_metric_counts(self, family: Family) -> None:
        path = choices(family.folder / "c.yaml")
        usual, scores = family.scores(path), family.scores(path, metric="acc_norm")
        assert scores.of("one").facts.name == "acc_norm"
        assert figures(scores, "one") == figures(usual, "one")
        assert scores.values["one"] == usual.of("one").others["acc_norm"]

    def test_filters_are_told_apart(self, family: Family) -> None:
        path = generated(family.folder / "g.yaml")
        scores = family.scores(path, metric={"one": "exact_match,letter"})
        assert scores.of("one").facts.name == "exact_match,letter"
        assert scores.of("two").facts.name == "exact_match,strict"
        assert "exact_match_stderr,strict" in scores.of("one").others

    def test_several_tasks_of_lm_eval_the_first_counts(self, family: Family) -> None:
        paths = [choices(family.folder / "c.yaml"), rolling(family.folder / "r.yaml")]
        tasks = {name: [str(path) for path in paths] for name in NAMES}
        scores = family.scores(tasks)
        folder = exported(family.bundle, "one", family.folder / "exported")
        own = own_figures(folder, paths[0])
        own |= {f"r/{name}": value for name, value in own_figures(folder, paths[1]).items()}
        assert figures(scores, "one") == own
        counted = family.scores(tasks, metric="r/bits_per_byte")
        assert counted.values["one"] == own["r/bits_per_byte"]
        assert counted.lower == {*NAMES}

    def test_a_group_that_is_scored_as_one(self, family: Family) -> None:
        folder = family.folder / "tasks"
        folder.mkdir()
        for name, doc in {"first": "{{prompt}}", "second": "a {{prompt}}"}.items():
            choices(folder / f"{name}.yaml", doc_to_text=doc)
        both = group(folder / "both.yaml", ["first", "second"])
        with pytest.raises(
            DataError, match=r"both\.yaml: is a group .*: give 'both', and as `incl"
        ):
            family.scores(both)
        scores = family.scores("both", include_path=str(folder))
        model = exported(family.bundle, "one", family.folder / "exported")
        assert figures(scores, "one") == own_figures(model, both)
        assert scores.of("one").rows == 50

    def test_in_one_line(self, family: Family) -> None:
        paths = [choices(family.folder / "c.yaml"), rolling(family.folder / "r.yaml")]
        out = family.folder / "out"
        asked = f"lm_eval:{paths[0]}"
        line = ("test", family.bundle.path, "--out", out, "--limit", 9, "--data")
        run(*line, asked)
        found = known_scores_of(out)
        assert found == family.scores(paths[0], limit=9).values
        run(*line, f"one={asked},{paths[1]}", f"two=lm_eval:{paths[1]}")
        mixed = known_scores_of(out)
        assert mixed["one"] == found["one"]
        assert mixed["two"] == family.scores(paths[1], limit=9).values["two"]
        told = run(*line, asked, "--split", "train", code=1)
        assert "LMEval has no setting 'splits'" in told

    def test_codecs_are_compared_by_them(self, family: Family) -> None:
        module = ReuseModule(causal_lm(str(family.base)), finetuned=dict(family.models))
        path = choices(family.folder / "c.yaml")
        out = family.folder / "out"
        asked: Any = {"SVD": SVD(4)}
        rows = {
            row.name: row
            for row in compare(module, LMEval(dict.fromkeys(NAMES, str(path))), asked, out).rows
        }
        assert rows["SVD"].scores.values == family.scores(path).values
        kept = compare(module, LMEval(dict.fromkeys(NAMES, str(path))), asked, out)
        assert len([*(out / "rows").iterdir()]) == len(kept.rows) == 3
        compare(module, LMEval(dict.fromkeys(NAMES, str(path)), limit=20), asked, out)
        assert len([*(out / "rows").iterdir()]) == 6


def in_each(rank: int, count: int, folder: Path, spread: Any) -> None:
    """What each of several processes does."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(folder / f"cache{rank}")  # type: ignore[assignment]
    module = ReuseModule(causal_lm(str(folder / "base")), str(folder / "bundle"))
    data = LMEval({"one": str(folder / "c.yaml"), "two": str(folder / "r.yaml")})
    trainer = plain_trainer(accelerator="cpu", devices=count, strategy="ddp")
    scores = evaluate(module, data, trainer, spread)
    (folder / f"{rank}.json").write_text(json.dumps(scores.rows()))


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["rows", "tasks"])
def test_several_processes_find_the_same(spread: str, family: Family) -> None:
    paths = {"one": choices(family.folder / "c.yaml"), "two": rolling(family.folder / "r.yaml")}
    together(2, in_each, family.folder, spread)
    alone = family.scores({task: str(path) for task, path in paths.items()}).rows()
    for rank in range(2):
        assert json.loads((family.folder / f"{rank}.json").read_text()) == alone


class TestBadInput:
    def test_lm_eval_is_not_installed(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(FusionKitError, match=r"pip install 'fusionkit\[harness\]'"):
            family.scores(choices(family.folder / "c.yaml"))

    def test_a_data_set_is_on_the_network(self, family: Family) -> None:
        path = choices(family.folder / "c.yaml", dataset_path="some/where", dataset_kwargs={})
        with pytest.raises(DataError, match=r"'.*c\.yaml' needs a data set from the network"):
            family.scores(path)

    def test_no_file(self, family: Family) -> None:
        with pytest.raises(DataError, match=r"nowhere\.yaml: no such file"):
            family.scores(family.folder / "nowhere.yaml")
        path = choices(family.folder / "c.yaml")
        with pytest.raises(DataError, match=r"include_path: .* is no folder"):
            family.scores(path, include_path=str(path))

    def test_a_file_that_is_no_task(self, family: Family) -> None:
        path = choices(family.folder / "c.yaml", output_type="multiplechoice")
        with pytest.raises(DataError, match=r"c\.yaml' can't be loaded: .*multiplechoice"):
            family.scores(path)

    @pytest.mark.slow  # lm-eval reads its thousands of tasks
    def test_unknown_tasks(self, family: Family) -> None:
        with pytest.raises(DataError, match="no task 'hellaswagg'; did you mean 'hellaswag'"):
            family.scores("hellaswagg")

    def test_a_group_without_a_score(self, family: Family) -> None:
        folder = family.folder / "tasks"
        folder.mkdir()
        for name in ("first", "second"):
            choices(folder / f"{name}.yaml")
        group(folder / "both.yaml", ["first", "second"], aggregates=False)
        with pytest.raises(DataError, match=r"no score of its own.*\[first, second\]"):
            family.scores("both", include_path=str(folder))
        listed = {name: ["first", "both"] for name in NAMES}
        scores = family.scores(listed, include_path=str(folder))
        assert "second/acc" in scores.of("one").others

    def test_unknown_metrics(self, family: Family) -> None:
        path = choices(family.folder / "c.yaml")
        with pytest.raises(FusionKitError, match=r"no metric 'acc_nrm'.*did you mean acc_norm"):
            family.scores(path, metric="acc_nrm")
        with pytest.raises(
            FusionKitError, match="lm-eval scores by its own metrics: acc, acc_norm"
        ):
            family.scores(path, metric="MeanSquaredError")

    def test_models_that_write_nothing(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        for name in ("base", "one"):
            BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        model = sequence_classifier(str(tmp_path / "base"))
        module = ReuseModule(model, finetuned={"one": str(tmp_path / "one")})
        with pytest.raises(FusionKitError, match="BertForSequenceClassification is no causal"):
            scored(module, {"one": str(choices(tmp_path / "c.yaml"))})

    def test_no_tokenizer(self, family: Family) -> None:
        module = family.module()
        model: Any = module.model
        model.config._name_or_path = model.name_or_path = ""
        path = choices(family.folder / "c.yaml")
        with pytest.raises(DataError, match="tokenizer is, its model does not say"):
            family.scores(path, module)
        scores = family.scores(path, module, tokenizer=str(family.base))
        assert scores.values == family.scores(path).values

    def test_no_chat_template(self, family: Family) -> None:
        path = choices(family.folder / "c.yaml")
        with pytest.raises(DataError, match="has no chat template; leave `apply_chat_template`"):
            family.scores(path, apply_chat_template=True)

    def test_code_that_a_model_writes_is_not_run(self, family: Family) -> None:
        path = choices(family.folder / "c.yaml", unsafe_code=True)
        with pytest.raises(DataError, match=r"lm-eval refuses c: .*unsafe"):
            family.scores(path)

    def test_there_is_nothing_to_learn_from(self, family: Family) -> None:
        data = LMEval(dict.fromkeys(NAMES, str(choices(family.folder / "c.yaml"))))
        module = ReuseModule(causal_lm(str(family.base)), finetuned=dict(family.models))
        with pytest.raises(DataError, match="for scoring alone; fine-tune, or calibrate"):
            fusionkit.calibrate(module, data, codec=fusionkit.DBMS(SVD(4)))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"tasks": {"one": []}}, "task 'one' has none of lm-eval's tasks"),
            ({"tasks": {"one": "c"}, "limit": 0}, "limit to be at least 1 document, got 0"),
        ],
    )
    def test_settings(self, settings: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            LMEval(**settings)
