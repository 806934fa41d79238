"""What language models read: texts, prompts with answers, choices, chats; and what is refused."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import ANSWERED, CHAT, MARKED, QUESTION, TEXT, data, jsonl, tokenizer

from fusionkit.errors import DataError
from fusionkit.tasks.generation import Generation
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.language_modeling import LanguageModeling, TextToText
from fusionkit.tasks.language_tokens import LanguageTokens
from fusionkit.tasks.multiple_choice import MultipleChoice

CHATTED = {
    "messages": [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "ate the hat"},
    ]
}


def rows(found: LanguageData, place: int = 0) -> Any:
    return list(found.test_dataloader()[place].dataset)


class TestForms:
    def test_what_each_task_is(self, tmp_path: Path) -> None:
        plain = tmp_path / "plain.txt"
        plain.write_text(TEXT)
        made = data(
            tmp_path,
            plain,
            jsonl(tmp_path / "texts.jsonl", [{"text": TEXT}]),
            jsonl(tmp_path / "choices.jsonl", [QUESTION]),
            jsonl(tmp_path / "completions.jsonl", [ANSWERED]),
            jsonl(tmp_path / "written.jsonl", [ANSWERED]),
            generate=["written"],
        )
        assert made.kinds == {
            "plain": LanguageModeling(),
            "texts": LanguageModeling(),
            "choices": MultipleChoice(2),
            "completions": LanguageModeling(),
            "written": Generation(None),
        }
        kinds = data(tmp_path, tmp_path / "completions.jsonl", encoder_decoder=True).kinds
        assert kinds == {"completions": TextToText()}

    def test_gzipped_splits_of_a_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "books"
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.txt.gz").write_bytes(gzip.compress(f"{split} {TEXT}".encode()))
        made = data(tmp_path, folder, max_length=8)
        (first,) = (row for row in rows(made) if "test" in made.tokenizer.decode(row["labels"]))
        assert first["input_ids"] == made.tokenizer(f"test {TEXT}")["input_ids"][:8]
        assert len(made.train_dataloader()[0].dataset) > 1  # type: ignore[arg-type]

    def test_other_names_of_columns(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "q.jsonl", [{"question": "the cat", "completion": " sat"}])
        with pytest.raises(DataError, match=r"has the columns 'question', .*{prompt: question}"):
            data(tmp_path, path)
        assert rows(data(tmp_path, path, columns={"prompt": "question"}))

    def test_datasets(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="pip install .[test]")
        datasets.Dataset.from_list([QUESTION] * 3).to_parquet(tmp_path / "q.parquet")
        made = data(tmp_path, tmp_path / "q.parquet")
        assert made.kinds == {"q": MultipleChoice(2)}
        assert len(rows(made)) == 3


class TestPieces:
    def test_packed_ones_make_the_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text(TEXT)
        made = data(tmp_path, path, max_length=8)
        found = sorted(rows(made), key=lambda row: -len(row["input_ids"]))
        whole = made.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert all(row["input_ids"][0] == made.tokenizer.bos_token_id for row in found)
        assert sorted(t for row in found for t in row["input_ids"][1:]) == sorted(whole)
        assert [len(row["input_ids"]) for row in found[:-1]] == [8] * (len(found) - 1)
        assert sum(row["bytes"] for row in found) == pytest.approx(len(TEXT.encode()))
        dropped = rows(data(tmp_path, path, max_length=8, last_piece="drop"))
        assert len(dropped) == len(whole) // 7

    def test_several_texts(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "the dog sat"}])
        made = data(tmp_path, path)
        one, two = (made.tokenizer(t)["input_ids"] for t in ("the cat", "the dog sat"))
        assert [row["input_ids"] for row in rows(made)] == [[*one, 2, *two[1:], 2]]
        padded = rows(data(tmp_path, path, packed=False))
        assert [row["input_ids"] for row in padded] == [[*one, 2], [*two, 2]]

    def test_none_left(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("the cat")
        with pytest.raises(DataError, match=r"a\.txt: has less than one piece of 48 tokens"):
            rows(data(tmp_path, path, last_piece="drop"))


class TestAnswers:
    def test_the_answer_alone_counts(self, tmp_path: Path) -> None:
        made = data(tmp_path, jsonl(tmp_path / "a.jsonl", [ANSWERED]))
        (row,) = rows(made)
        prompt = made.tokenizer("the cat")["input_ids"]
        answer = made.tokenizer(" sat", add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == [*prompt, *answer, 2]
        assert row["labels"] == [-100] * len(prompt) + [*answer, 2]
        assert row["bytes"] == 4
        (bare,) = rows(data(tmp_path, tmp_path / "a.jsonl", end=False))
        assert bare["input_ids"] == [*prompt, *answer]

    def test_a_space_belongs_to_the_answer(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        tokens = LanguageTokens(str(tmp_path))
        assert tokens.answered("the cat ", "sat", "") == tokens.answered("the cat", " sat", "")

    def test_left_padding_for_generation_alone(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [ANSWERED, {"prompt": TEXT[:40], "completion": " x"}])
        made = data(tmp_path, path, generate=True, generation={"max_new_tokens": 4})
        (batch,) = made.test_dataloader()[0]
        short = batch["prompts_mask"].sum(1).argmin()
        assert batch["prompts_mask"][short].tolist() == sorted(batch["prompts_mask"][short])
        mask = batch["attention_mask"][short].tolist()
        assert mask == sorted(mask, reverse=True)
        assert len(set(mask)) == 2

    def test_batches_by_length(self, tmp_path: Path) -> None:
        drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
        path = jsonl(
            tmp_path / "a.jsonl", [{"prompt": "the" * (n + 1), "completion": "x"} for n in drawn]
        )
        widths = [b["input_ids"].shape[1] for b in data(tmp_path, path).test_dataloader()[0]]
        assert widths == sorted(widths)
        assert widths[0] < widths[-1] / 2


class TestChats:
    @pytest.mark.parametrize("template", [CHAT, MARKED])
    def test_what_the_assistant_says_counts(self, tmp_path: Path, template: str) -> None:
        made = data(tmp_path, jsonl(tmp_path / "c.jsonl", [CHATTED]), chat=template, max_length=64)
        (row,) = rows(made)
        said = made.tokenizer.decode([t for t in row["labels"] if t != -100])
        assert said == "sat</s>ate the hat</s>"
        assert row["bytes"] == len("sat" + "ate the hat")

    def test_generated_from_the_prompt(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "c.jsonl", [CHATTED])
        settings: Any = {"generate": True, "generation": {"max_new_tokens": 8}}
        made = data(tmp_path, path, chat=CHAT, max_length=64, **settings)
        (row,) = rows(made)
        assert made.tokenizer.decode(row["prompts"]).endswith("[user]\nthe dog</s>[assistant]\n")
        assert row["references"] == ["ate the hat"]

    def test_a_template_given(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "c.jsonl", [CHATTED])
        (tmp_path / "t.jinja").write_text(CHAT)
        assert rows(data(tmp_path, path, chat_template=str(tmp_path / "t.jinja"), max_length=64))
        with pytest.raises(DataError, match=r"gone\.jinja: no such file"):
            data(tmp_path, path, chat_template=str(tmp_path / "gone.jinja"))

    def test_no_template(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "c.jsonl", [CHATTED])
        cases: list[Any] = [{}, {"generate": True, "generation": {"max_new_tokens": 8}}]
        for settings in cases:
            with pytest.raises(DataError, match=r"c\.jsonl, line 1: .* has no chat template"):
                rows(data(tmp_path, path, **settings))

    def test_one_that_is_too_long(self, tmp_path: Path) -> None:
        made = data(tmp_path, jsonl(tmp_path / "c.jsonl", [CHATTED]), chat=CHAT)
        with pytest.raises(
            DataError, match=r"has 52 tokens, and `max_length`, 48, has room for no"
        ):
            rows(made)

    def test_a_template_that_hides_what_was_said(self, tmp_path: Path) -> None:
        """As some do with earlier thoughts: the tokens that are learned would be others'."""
        hiding = CHAT.replace("m['content']", "m['content'] if loop.last else '-'")
        made = data(tmp_path, jsonl(tmp_path / "c.jsonl", [CHATTED]), chat=hiding)
        with pytest.raises(DataError, match=r"line 1: .* can't be told: by the chat template"):
            rows(made)

    def test_a_template_that_refuses(self, tmp_path: Path) -> None:
        refusing = "{{ raise_exception('roles must alternate') }}"
        made = data(tmp_path, jsonl(tmp_path / "c.jsonl", [CHATTED]), chat=refusing)
        with pytest.raises(DataError, match=r"line 1: .*refuses its messages \(roles must"):
            rows(made)


class TestRefused:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "a", "answer": 0}, "line 2: has nothing in column 'choices'"),
            ({**QUESTION, "choices": ["a"]}, "line 2: expected two or more texts in 'choices'"),
            ({**QUESTION, "answer": 2}, "line 2: expected in 'answer' which of its 2 choices"),
            ({**QUESTION, "answer": "x"}, "line 2: expected in 'answer' .* got 'x'"),
            ({**QUESTION, "prompt": 3}, "line 2: expected a text in 'prompt', got int"),
        ],
    )
    def test_a_row(self, tmp_path: Path, row: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            rows(data(tmp_path, jsonl(tmp_path / "q.jsonl", [QUESTION, row])))

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("hello", r"line 1: expected in 'messages' a list of objects with 'role'"),
            ([{"role": "user"}], r"line 1: expected in 'messages' a list"),
            ([{"role": "user", "content": "a"}], r"line 1: its last message is of 'user'"),
        ],
    )
    def test_a_chat(self, tmp_path: Path, messages: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            rows(data(tmp_path, jsonl(tmp_path / "c.jsonl", [{"messages": messages}]), chat=CHAT))

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "q.jsonl", [QUESTION])
        with pytest.raises(DataError, match="gone: no tokenizer there"):
            LanguageData({"q": str(path)}, str(tmp_path / "gone"))

    @pytest.mark.parametrize("row", [QUESTION, ANSWERED])
    def test_a_prompt_that_is_too_long(self, tmp_path: Path, row: dict[str, Any]) -> None:
        path = jsonl(tmp_path / "q.jsonl", [{**row, "prompt": TEXT * 3}])
        with pytest.raises(
            DataError, match=r"line 1: has \d+ tokens, and `max_length`, 48, has room .*`cut: left`"
        ):
            rows(data(tmp_path, path))
        (found,) = rows(data(tmp_path, path, cut="left"))
        tokens = found["choices"][0][0] if "choices" in found else found["input_ids"]
        assert len(tokens) == 48
        assert tokens[0] != 1  # its beginning is gone

    def test_an_answer_without_room(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "q.jsonl", [{"prompt": "a", "completion": TEXT * 3}])
        with pytest.raises(
            DataError, match="48, has room for 0 beside the answer's; give a larger"
        ):
            rows(data(tmp_path, path, cut="left"))

    def test_texts_to_be_generated(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "t.jsonl", [{"text": TEXT}])
        with pytest.raises(DataError, match="texts without prompts"):
            data(tmp_path, path, generate=["t"])
        with pytest.raises(DataError, match="generate: there is no task 'x' among t"):
            data(tmp_path, path, generate=["x"])

    def test_choices_for_an_encoder(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "q.jsonl", [QUESTION])
        with pytest.raises(DataError, match=r"choices are scored by causal .*`generate: \[q\]`"):
            data(tmp_path, path, encoder_decoder=True)
        (row,) = rows(data(tmp_path, path, encoder_decoder=True, generate=["q"]))
        assert row["references"] == [" ate"]
