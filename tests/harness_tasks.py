"""lm-eval's tasks as YAML files over rows that are there, and what its own `hf` makes of them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_language import TEXT, jsonl

import fusionkit

ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
WORDS = ("cat", "dog", "hat", "mat", "log")
QUESTIONS = [
    {"prompt": f"the {a} sat on the {b}", "choices": [" cat", " a dog", " hats"], "answer": n % 3}
    for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)
]


def task(path: Path, rows: Iterable[Any], **settings: Any) -> Path:
    """A task of JSON lines, called as its file; both in one folder."""
    data = jsonl(path.with_suffix(".jsonl"), rows)
    config = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "target_delimiter": "",
        **settings,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def choices(path: Path, **settings: Any) -> Path:
    """Multiple choice: right ones, raw and length-normalised, and how sure they are."""
    own = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [ACC, {**ACC, "metric": "acc_norm"}, {"metric": "brier_score"}],
    }
    return task(path, QUESTIONS, **{**own, **settings})


def rolling(path: Path) -> Path:
    """Whole texts, longer than a tiny model's context."""
    return task(
        path,
        [{"text": TEXT}, {"text": f"{TEXT} {TEXT}"}, {"text": "a cat"}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("bits_per_byte", "word_perplexity")],
    )


def generated(path: Path) -> Path:
    """What a model writes, exactly, after two filters."""
    taken = {"function": "take_first"}
    cut = {"function": "regex", "regex_pattern": "(\\w)"}
    return task(
        path,
        [{"prompt": row["prompt"], "completion": "a"} for row in QUESTIONS],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{completion}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 6},
        filter_list=[
            {"name": "strict", "filter": [taken]},
            {"name": "letter", "filter": [cut, taken]},
        ],
        metric_list=[{**ACC, "metric": "exact_match"}],
    )


KINDS: Mapping[str, Callable[[Path], Path]] = {
    "choices": choices,
    "rolling": rolling,
    "generated": generated,
}


def group(path: Path, members: list[str], aggregates: bool = True) -> Path:
    """A group of tasks beside it, with a score of its own or not."""
    config: dict[str, Any] = {"group": path.stem, "task": members}
    if aggregates:
        config["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    path.write_text(yaml.safe_dump(config))
    return path


def numbers(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """One task's figures, as lm-eval's tables have them."""
    return {
        key.removesuffix(",none"): value
        for key, value in results[name].items()
        if "," in key and isinstance(value, int | float)
    }


def own_figures(folder: Path, path: Path, **settings: Any) -> dict[str, float]:
    """What lm-eval's own `hf` makes of a model's folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32"},
        tasks=[path.stem],
        task_manager=TaskManager(include_defaults=False, include_path=str(path.parent)),
        **settings,
    )
    return numbers({**results["results"], **results.get("groups", {})}, path.stem)


def exported(bundle: Any, task: str, folder: Path) -> Path:
    """A task's model with its tokenizer, as 'fusionkit export' writes it."""
    fusionkit.export_task(bundle, task, folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, a cache of its own; and lm-eval doesn't look for seconds at what is installed."""
    datasets = pytest.importorskip("datasets", reason="pip install .[test]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
