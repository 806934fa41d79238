"""The papers' recipes over text, end to end, on tiny models of the same classes and layouts."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_glue
import hub_text_models
import pytest
import torch
import yaml
from harness_tasks import choices
from hub_cache import cached
from PIL import Image
from program import run
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tiny_net import TESTS

from fusionkit import ReuseModule
from fusionkit.tasks.models import seq2seq_lm

RECIPES = TESTS.parent / "recipes/papers"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub_cache: Path) -> Path:
    """The cache; what `datasets` makes of its files, and the folder to be in, are the test's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)
    return hub_cache


def shown(recipe: str) -> Any:
    """A recipe as `--print_config` has it."""
    return yaml.safe_load(run("compare", "--config", RECIPES / f"{recipe}.yaml", "--print_config"))


def compared(recipe: str, *codecs: str, **data: Any) -> dict[str, dict[str, str]]:
    """Run a recipe with some of its codecs alone: rows of its table by name."""
    known = shown(recipe)["codecs"]
    own = json.dumps({name: known[name] for name in codecs})
    options = [f"--data.{name}={json.dumps(value)}" for name, value in data.items()]
    run(
        *("compare", "--config", RECIPES / f"{recipe}.yaml", f"--codecs={own}"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *options),
    )
    table = Path(f"out/papers/{recipe}/compare.csv").read_text().splitlines()
    rows = {row["name"]: row for row in csv.DictReader(table)}
    ours = [name for name, row in rows.items() if row["kind"] != "published"]
    assert ours == ["fine-tuned", "base", *codecs]
    return rows


def said(folder: Path, base: Path, rows: Any) -> list[list[float]]:
    """What plain transformers makes of rows, one at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        return [model(**tokenizer(*row, return_tensors="pt")).logits[0].tolist() for row in rows]


def judged(task: str, split: str, hub: Path, folder: Path, base: Path, metric: str = "") -> float:
    """A task's score by plain transformers, and other libraries' metrics."""
    import datasets

    rows = datasets.load_dataset(str(cached(hub, "nyu-mll/glue", "dataset")), task)[split]
    texts = zip(*(rows[name] for name in hub_glue.COLUMNS[task]), strict=True)
    outputs = said(folder, base, list(texts))
    if task == "stsb":
        numbers = [one for (one,) in outputs]
        both = pearsonr(numbers, rows["label"])[0], spearmanr(numbers, rows["label"])[0]
        return float(sum(both)) / 2
    classes = [each.index(max(each)) for each in outputs]
    right = matthews_corrcoef if metric.endswith("MatthewsCorrCoef") else accuracy_score
    return float(right(rows["label"], classes))


@pytest.mark.nightly
@pytest.mark.slow
def test_gpt2(hub: Path) -> None:
    """Scores are those of plain transformers; MNLI's of the mismatched rows."""
    hub_glue.write(hub)
    hub_text_models.gpt2(hub)
    rows = compared("gpt2_glue", "EMR", "PERU-FFT 10%")
    base = cached(hub, "openai-community/gpt2")
    for task in hub_glue.CLASSES:
        split = "validation_mismatched" if task == "mnli" else "validation"
        wanted = judged(task, split, hub, cached(hub, f"tanganke/gpt2_{task}"), base)
        assert float(rows["fine-tuned"][f"score/{task}"]) == pytest.approx(wanted), task
    assert rows["EMR-Merging"]["source"].startswith("EMR-Merging (arXiv 2405.17461)")


@pytest.mark.nightly
@pytest.mark.slow
def test_roberta(hub: Path) -> None:
    """One repository with a folder for each task, of pickles."""
    hub_glue.write(hub)
    hub_text_models.roberta(hub)
    rows = compared("roberta_glue", "EMR", "DBMS 1%")
    base = cached(hub, "FacebookAI/roberta-base")
    for task in hub_glue.TASKS:
        split = "validation_matched" if task == "mnli" else "validation"
        own = next((cached(hub, "vanillaOVO/roberta_base_glue_ckpts") / task).iterdir())
        metric = rows["fine-tuned"][f"metric/{task}"]
        wanted = judged(task, split, hub, own, base, metric)
        assert float(rows["fine-tuned"][f"score/{task}"]) == pytest.approx(wanted, abs=1e-5), task
    assert "EMR-Merging" in rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [pytest.param(False, marks=pytest.mark.nightly), True], ids=["full", "lora"]
)
def test_flan_t5(lora: bool, hub: Path) -> None:
    """How its answers are scored is held to in tests/tasks/test_glue.py."""
    hub_glue.write(hub)
    hub_text_models.flan_t5(hub, lora)
    if lora:
        rows = compared("flan_t5_glue_lora", "PERU-LoRA 4", "EMR")
        assert {"LoRA, FusionBench", "base, FusionBench"} <= rows.keys()
    else:
        rows = compared("flan_t5_glue", "EMR", "PERU-FFT 10%")
        assert "fine-tuned, FusionBench" in rows
    metrics = {task: rows["fine-tuned"][f"metric/{task}"] for task in hub_glue.TASKS}
    assert metrics.pop("stsb") == "SpearmanCorrCoef"
    assert set(metrics.values()) == {"MulticlassAccuracy"}


@pytest.mark.nightly
@pytest.mark.slow
def test_ia3(hub: Path) -> None:
    """Bare vectors become PEFT's; what they do is what they did where TIES-Merging put them."""
    hub_text_models.t0(hub, Path("vectors"))
    for file in Path("vectors").glob("*.pt"):
        script = RECIPES / "shared/ia3_as_peft.py"
        subprocess.run([sys.executable, script, file, f"models/ia3/{file.stem}"], check=True)
    super_glue(hub)
    rows = compared("ia3_t0", "EMR", "TIES")
    assert rows["fine-tuned"]["metric/anli-r3"] == "MulticlassAccuracy"
    scaled = ia3_by_hand(cached(hub, "bigscience/T0_3B"), Path("vectors/cb.pt"))
    reuse = ReuseModule(
        seq2seq_lm("bigscience/T0_3B"), finetuned={"cb": "models/ia3/cb"}, adapters="modules"
    )
    reuse.switch("cb")
    asked = {name: torch.tensor([[5, 9, 11, 1]]) for name in ("input_ids", "decoder_input_ids")}
    torch.testing.assert_close(reuse(**asked).logits, scaled(**asked).logits)


def ia3_by_hand(base: Path, vectors: Path) -> Any:
    """A model whose modules' outputs are scaled, as TIES-Merging's code does it."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    for name, scale in torch.load(vectors, weights_only=True).items():
        module = model.get_submodule(name.removesuffix(".ia3_vector"))
        module.register_forward_hook(lambda _, __, out, scale=scale: out * scale)
    return model


def super_glue(hub: Path) -> None:
    """Four of SuperGLUE's tasks and ANLI, with a few rows each."""
    from datasets import ClassLabel, Dataset, Features, Value

    yes_no, entailed = ["False", "True"], ["entailment", "neutral", "contradiction"]
    columns = {
        "rte": (["premise", "hypothesis"], ["entailment", "not_entailment"]),
        "cb": (["premise", "hypothesis"], ["entailment", "contradiction", "neutral"]),
        "wic": (["word", "sentence1", "sentence2"], yes_no),
        "wsc.fixed": (["text", "span1_text", "span2_text"], yes_no),
        "plain_text": (["premise", "hypothesis"], entailed),
    }
    cards: dict[str, list[Any]] = {}
    for config, (names, classes) in columns.items():
        rounds = [f"{split}_r{n}" for split in ("train", "dev", "test") for n in (1, 2, 3)]
        anli = config == "plain_text"
        name = "facebook/anli" if anli else "aps/super_glue"
        folder = cached(hub, name, "dataset")
        (folder / config).mkdir()
        kinds = dict.fromkeys(names, Value("string"))
        features = Features({**kinds, "label": ClassLabel(names=classes)})
        files = []
        for split in rounds if anli else ("train", "validation", "test"):
            hidden = split == "test"
            rows = [
                {**dict.fromkeys(names, hub_glue.WORDS[row]), "label": -1 if hidden else row % 2}
                for row in range(4)
            ]
            file = folder / config / f"{split}-00000-of-00001.parquet"
            Dataset.from_list(rows, features=features).to_parquet(file)
            files.append({"split": split, "path": f"{config}/{split}-*"})
        cards.setdefault(name, []).append({"config_name": config, "data_files": files})
    for name, configs in cards.items():
        card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
        (cached(hub, name, "dataset") / "README.md").write_text(card)


@pytest.mark.nightly
@pytest.mark.slow
def test_mergebench(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, rows added to the vocabulary; lm-eval's tasks are others, of rows that are here."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    hub_text_models.llama(hub)
    scored = shown("mergebench_llama_3b")["data"]["init_args"]["tasks"]
    assert scored.keys() < {*hub_text_models.SKILLS}
    tasks = {name: str(choices(Path(f"{name}.yaml").resolve())) for name in ("math", "coding")}
    rows = compared("mergebench_llama_3b", "EMR", tasks=tasks)
    assert rows["fine-tuned"]["metric/math"] == "acc"


@pytest.mark.slow
def test_smolvlm(hub: Path) -> None:
    hub_text_models.smolvlm(hub, Path("models/smolvlm"))
    questions(hub, "HuggingFaceM4/ChartQA", "query", "label", "test")
    questions(hub, "HuggingFaceM4/DocumentVQA", "question", "answers", "validation", "test")
    rows = compared("smolvlm_vqa", "EMR", "SVD 16 int4")
    assert rows["fine-tuned"]["metric/documents"] == "ExactMatch"


def questions(hub: Path, name: str, question: str, answer: str, *splits: str) -> None:
    """A data set of questions about images; of splits after the first, answers are hidden."""
    from datasets import Dataset

    folder = cached(hub, name, "dataset") / "data"
    folder.mkdir()
    for split in ("train", *splits):
        answers = [] if split == "test" and len(splits) > 1 else ["a cat", "the cat"]
        images = [Image.new("RGB", (24, 16), (40 * place, 9, 99)) for place in range(4)]
        rows = [{"image": image, question: "what sat?", answer: answers} for image in images]
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
