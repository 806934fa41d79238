"""A server of tiny language models, and applications whose engine is in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import serving
from served import Served, application, asking
from talking import TEMPLATE, bundle, tokenizer

import fusionkit
from fusionkit import SVD, Bundle

transformers = pytest.importorskip("transformers", reason="pip install .[test]")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, `cats` and `dogs`, and their bundle, `talk.bundle`."""
    folder = tmp_path_factory.mktemp("served")
    bundle("llama, tied", folder, TEMPLATE, context=4096)
    return folder


@pytest.fixture(scope="session")
def sorting(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of classifiers of texts: `moods`, of three classes, and `topics`, of two."""
    folder = tmp_path_factory.mktemp("sorting")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=28,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    base = transformers.BertModel(config).eval()
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    for task, names in {"moods": ["glad", "sad", "so-so"], "topics": ["art", "war"]}.items():
        labels = dict(enumerate(names))
        head = transformers.BertConfig(**{**config.to_dict(), "id2label": labels})
        model = transformers.BertForSequenceClassification(head).eval()
        model.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(folder / task)
    paths = {task: str(folder / task) for task in ("moods", "topics")}
    out = folder / "sort.bundle"
    return fusionkit.compress(str(folder / "base"), paths, SVD(6), out, private=["classifier.*"])


@pytest.fixture(scope="session")
def talker(models: Path) -> Iterator[Served]:
    """A server, with models in `models` that may be added."""
    with Served(models / "talk.bundle", "--device", "cpu", "--tasks-root", models) as server:
        yield server
        # At the end it is told to stop while many ask: they are answered to the end.
        ends = serving.stop_under_load(server)
        assert ends == {"data: [DONE]": 8, "exit 0": 1}
        told = "\n".join(server.told)
        assert "stopping: no new requests are taken; 8 rows are being answered" in told
        assert told.endswith("fusionkit serve: stopped")
        events = [line["event"] for line in server.log]
        assert (events[0], events[-1]) == ("started", "stopped")
        assert not any("b c" in str(line) for line in server.log)


@pytest.fixture
def here(models: Path) -> Iterator[Any]:
    """A client of the same bundle's application within this process."""
    yield from asking(application(models / "talk.bundle"))


@pytest.fixture
def sorter(sorting: Bundle) -> Iterator[Any]:
    """A client of the application of the classifiers, within this process."""
    yield from asking(application(sorting.path))
