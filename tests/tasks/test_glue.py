"""GLUE's metrics by its tasks' names, and models that answer in words; sklearn, scipy judge."""

from pathlib import Path
from typing import Any

import pytest
import tiny_language
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tiny_tasks import trainer
from torch import Tensor

import fusionkit
from fusionkit import SVD, Classification, Regression, ReuseModule
from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.asked import AnsweredClass, AnsweredNumber, Asked
from fusionkit.tasks.glue import GLUE, glue_task
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.metrics import metrics_of, update
from fusionkit.tasks.models import seq2seq_lm
from fusionkit.tasks.table_files import read_table

SAID = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1])
RIGHT = torch.tensor([0, 1, 0, 0, 1, 1, 1, 0])


def scored(task: str, kind: Any, outputs: Tensor, batch: Any) -> dict[str, float]:
    """All metrics of GLUE's task, the one that counts first."""
    metrics, _ = metrics_of("glue", task, kind)
    for metric in metrics.values():
        update(metric, task, kind, outputs, batch)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


class TestMetrics:
    @pytest.mark.parametrize(
        "task", ["cola", "CoLA", "mrpc", "qqp", "sst2", "SST-2", "rte", "qnli"]
    )
    def test_classes(self, task: str) -> None:
        found = scored(task, Classification(2), torch.eye(2)[SAID], (None, RIGHT))
        judged = {
            "Accuracy": accuracy_score(RIGHT, SAID),
            "F1Score": f1_score(RIGHT, SAID),
            "MatthewsCorrCoef": matthews_corrcoef(RIGHT, SAID),
        }
        wanted = {"cola": ["MatthewsCorrCoef"], "mrpc": ["Accuracy", "F1Score"]}
        wanted["qqp"] = wanted["mrpc"]
        names = wanted.get(task.lower(), ["Accuracy"])
        values = [judged[name] for name in names]
        assert list(found.values()) == pytest.approx(values)

    def test_three_classes(self) -> None:
        said, right = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1])
        found = scored("mnli_matched", Classification(3), torch.eye(3)[said], (None, right))
        assert [*found.values()] == [0.5]

    def test_numbers(self) -> None:
        said, right = torch.tensor([1.0, 2.5, 2.0, 4.0]), torch.tensor([0.5, 2.0, 3.0, 5.0])
        found = scored("stsb", Regression(), said, (None, right))
        one, other = pearsonr(said, right)[0], spearmanr(said, right)[0]
        assert [*found.values()] == pytest.approx([(one + other) / 2, one, other])

    def test_by_another_name(self) -> None:
        metrics, facts = metrics_of({"mine": "glue:cola"}, "mine", Classification(2))
        assert facts.name == "MulticlassMatthewsCorrCoef"
        assert len(metrics) == 1

    def test_no_such_task(self) -> None:
        with pytest.raises(FusionKitError, match="GLUE has no task 'colla'; did you mean 'cola'"):
            metrics_of("glue", "colla", Classification(2))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.encoder_decoder(tmp_path_factory.mktemp("t5"))


class Spoken:
    """A tokenizer of whole texts, which are their own tokens."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, *texts: str) -> None:
        self.known = [*texts]

    def batch_decode(self, rows: Tensor, **_: Any) -> list[str]:
        return [self.known[int(row[0])] for row in rows]


class TestAnswers:
    def test_words_that_are_no_class_are_wrong(self) -> None:
        """One more class for Matthews, and for F1 the other class: T5's `f1_score_with_invalid`."""
        kind = AnsweredClass(Spoken("no", "yes", "maybe"), words=("no", "yes"))  # type: ignore[arg-type]
        said, right = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 0, 1, 0, 1])
        batch = {"references": [[("no", "yes")[place]] for place in right]}
        (matthews,) = scored("cola", kind, said[:, None], batch).values()
        assert matthews == pytest.approx(matthews_corrcoef(right, said))
        found = scored("mrpc", kind, said[:, None], batch)
        valid = torch.where(said < 2, said, 1 - right)
        assert found == pytest.approx(
            {"Accuracy": accuracy_score(right, said), "F1Score": f1_score(right, valid)}
        )
        rows = kind.row_scores(kind.metric(), said[:, None], batch)
        assert rows is not None
        assert rows.tolist() == [1, 0, 0, 0, 1]

    def test_numbers(self) -> None:
        kind = AnsweredNumber(Spoken("4.0", "2.5", "nothing", "nan"))  # type: ignore[arg-type]
        said = torch.tensor([0, 1, 2, 3, 0])
        batch = {"references": [["4.5"], ["2.0"], ["1.0"], ["0.5"], ["4.0"]]}
        numbers, right = [4.0, 2.5, 0.0, 0.0, 4.0], [4.5, 2.0, 1.0, 0.5, 4.0]
        mean = (pearsonr(numbers, right)[0] + spearmanr(numbers, right)[0]) / 2
        assert scored("stsb", kind, said[:, None], batch)["mean"] == pytest.approx(mean)

    def test_the_whole_way(self, tmp_path: Path, t5: Path) -> None:
        """Labelled rows are asked, answered by a fine-tuned T5, switched to, and scored."""
        sentences = ["the cat", "a dog ate", "the mat", "hat hat hat", "on", "the log sat"]
        labels = [0, 1, 1, 0, 1, 0]
        path = tmp_path / "cola.csv"
        lines = [f"{text},{label}" for text, label in zip(sentences, labels, strict=True)]
        path.write_text("\n".join(["sentence,label", *lines]))
        tuned: Any = seq2seq_lm(str(t5))
        torch.manual_seed(1)
        for value in tuned.parameters():
            value.data += 0.3 * torch.randn(value.shape)
        made = tiny_language.tokenizer(tmp_path / "unused")
        prompt = "Is it good? {sentence}"
        texts = []
        for sentence in sentences:
            ids = made(prompt.format(sentence=sentence), return_tensors="pt").input_ids
            out = tuned.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
            texts.append(made.decode(out[0], skip_special_tokens=True).strip())
        words = [texts[0], next(text for text in texts if text != texts[0])]
        said = [words.index(text) if text in words else 2 for text in texts]
        rows = LanguageData(
            {"cola": str(path)},
            str(t5),
            encoder_decoder=True,
            asked={"cola": {"prompt": prompt, "answers": words}},
            generation={"max_new_tokens": 3},
        )
        matthews = "MatthewsCorrCoef"
        reuse = ReuseModule(
            seq2seq_lm(str(t5)),
            codec=SVD(rank=16, dtype="fp32"),
            finetuned={"cola": dict(tuned.state_dict())},  # type: ignore[dict-item]
            metric={"metrics": [matthews, "Accuracy", "ExactMatch"], "counts": matthews},
        )
        trainer().test(reuse, rows, verbose=False)
        assert reuse.scores is not None
        assert reuse.scores.values["cola"] == pytest.approx(
            matthews_corrcoef(labels, said), abs=1e-5
        )
        right = accuracy_score(labels, said)
        assert reuse.scores.of("cola").others["ExactMatch"] == pytest.approx(right)
        assert reuse.scores.of("cola").others["Accuracy"] == pytest.approx(right)
        predicted = {row["row"]: row for row in fusionkit.predict(reuse, rows)}
        assert [predicted[row]["prediction"] for row in range(len(texts))] == texts
        assert [predicted[row]["target"] for row in range(len(texts))] == [
            words[label] for label in labels
        ]


class TestAsked:
    def rows(self, folder: Path, asked: Any, *lines: str) -> list[Any]:
        path = folder / "rows.csv"
        path.write_text("\n".join(lines))
        table = Asked.of(asked, "t").rows(read_table(path, "test"))
        return [(row["prompt"], row["completion"]) for row in table.rows]

    def test_as_glue_asks(self, tmp_path: Path) -> None:
        found = self.rows(tmp_path, "glue:mnli", "premise,hypothesis,label", "A,B,2")
        prompt = GLUE["mnli"].prompt.replace("{premise}", "A").replace("{hypothesis}", "B")
        assert found == [(prompt, "contradiction")]
        found = self.rows(tmp_path, "glue:stsb", "sentence1,sentence2,score", "A,B,2.5")
        assert found[0][1] == "2.5"

    def test_a_prompt_of_ones_own(self, tmp_path: Path) -> None:
        own = {"prompt": "{b} or {a}?", "answers": ["left", "right"], "label": "side"}
        assert self.rows(tmp_path, own, "a,b,side", "x,y,right") == [("y or x?", "right")]

    @pytest.mark.parametrize(
        ("asked", "line", "said"),
        [
            ({"prompt": "{c}", "answers": ["n", "y"]}, "x,0", "has no column 'c'"),
            ({"prompt": "{a}", "answers": ["n", "y"]}, "x,2", "line 2: label '2' is no class from"),
            ({"prompt": "{a}", "answers": ["n", "n"]}, "x,0", "all of them different"),
            ({"prompt": "{a}"}, "x,0", "expected for task 't'"),
            ({"prompt": "{a}", "answers": "number"}, "x,many", "expected a number as its label"),
            ("glue", "x,0", "GLUE has no task 't'"),
        ],
    )
    def test_refused(self, tmp_path: Path, asked: Any, line: str, said: str) -> None:
        with pytest.raises(FusionKitError, match=said):
            self.rows(tmp_path, asked, "a,label", line)

    def test_a_task_that_is_not_there(self, tmp_path: Path, t5: Path) -> None:
        with pytest.raises(DataError, match="asked: there is no task 'b'"):
            LanguageData({"a": str(tmp_path)}, str(t5), asked={"b": "glue"})


def test_every_prompt_has_columns_and_words() -> None:
    for name, task in GLUE.items():
        assert "{" in task.prompt
        assert len(task.words) == (0 if name == "stsb" else 3 if name == "mnli" else 2)
    assert glue_task("glue", "mnli_mismatched") is GLUE["mnli"]
