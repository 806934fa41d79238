"""`fusionkit chat`, through a pipe, and `fusionkit generate`."""

import io
import json
import sys
from pathlib import Path

import pytest
from talking import TEMPLATE, bundle

from fusionkit.cli.main import main
from fusionkit.reuse.speaker import Speaker

MORE = ["--max-new-tokens", "5", "--device", "cpu"]


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    return bundle("llama, tied", tmp_path, TEMPLATE).path


def chat(path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    main(["chat", str(path), *MORE])


def answer(speaker: Speaker, *said: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return speaker.say(speaker.tokens(messages))


def test_a_conversation_goes_on_and_changes_hands(
    talk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("b c", "d", "/task dogs", "e", "/new", "b c", "/tasks", "/quit", "not read")
    chat(talk, monkeypatch, *lines)
    from fusionkit import Bundle

    speaker = Speaker(Bundle(talk), "cats", max_new_tokens=5)
    first = answer(speaker, "b c")
    second = answer(speaker, "b c", first, "d")
    speaker.switch("dogs")
    third = answer(speaker, "b c", first, "d", second, "e")
    anew = answer(speaker, "b c")
    out = capsys.readouterr().out
    assert out.startswith("cats answers, of 2 tasks: cats, dogs\n")
    said = out.partition("> b c\n")[2]
    assert said == (
        f"{first}\n> d\n{second}\n> /task dogs\ndogs answers\n> e\n{third}\n> /new\n"
        f"> b c\n{anew}\n> /tasks\n  cats\n* dogs\n  base\n> /quit\n"
    )


def test_two_tasks_answer_side_by_side(
    talk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusionkit import Bundle

    chat(talk, monkeypatch, "b c", "/compare dogs base", "/compare cats dogs f g", "d")
    speaker = Speaker(Bundle(talk), "cats", max_new_tokens=5)
    first = answer(speaker, "b c")
    found = {}
    for task in ("dogs", None):
        speaker.switch(task)
        found[task] = answer(speaker, "b c")
    out = capsys.readouterr().out
    assert "┃ dogs" in out
    row = next(line for line in out.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in row.split("│")[1:3]] == [found["dogs"], found[None]]
    speaker.switch("cats")
    assert out.endswith(f"> d\n{answer(speaker, 'b c', first, 'd')}\n")  # neither is remembered


def test_without_a_template_lines_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle("gpt2", tmp_path).path
    chat(path, monkeypatch, "b c", "b c")
    out = capsys.readouterr().out
    assert "has no chat template: each line is continued as it is" in out
    first, second = out.split("> b c\n")[1:]
    assert first == second


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/tsks", "no command '/tsks'; did you mean '/tasks'?"),
        ("/task dgos", "no task 'dgos'; did you mean 'dogs'?\nthere are cats, dogs"),
        ("/compare cats dogs", "expected /compare A B PROMPT"),
        (" ".join("b" * 40), "the prompt has 42 tokens, and the model's context is 32"),
    ],
)
def test_a_pipe_ends_at_what_can_not_be_done(
    talk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    told: str,
) -> None:
    with pytest.raises(SystemExit):
        chat(talk, monkeypatch, line, "b")
    assert capsys.readouterr().err.startswith(f"fusionkit chat: {told}")


def test_prompts_of_a_file_are_answered_in_their_order(
    talk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusionkit import Bundle

    rows = [
        {"id": 1, "prompt": "a b c d e f"},
        {"id": 2, "messages": [{"role": "user", "content": "b"}]},
        {"id": 3, "prompt": "a"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    out = tmp_path / "made" / "answers.jsonl"
    options = ["--task", "dogs", "--out", str(out), "--batch-size", "2", *MORE]
    main(["generate", str(talk), "--prompts", str(file), *options])
    speaker = Speaker(Bundle(talk), "dogs", max_new_tokens=5)
    wanted = [
        {**row, "completion": speaker.say(speaker.tokens(row.get("prompt") or row["messages"]))}
        for row in rows
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == wanted
    assert f"written: {out} (3 answers of dogs)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", str(talk), "--prompts", str(file), *options])
    assert "exists; choose another name, or set --overwrite" in capsys.readouterr().err


def test_lines_of_a_text_are_prompts_or_messages(
    talk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusionkit import Bundle

    file = tmp_path / "p.txt"
    file.write_text("a b\n\nc\n")
    speaker = Speaker(Bundle(talk), "cats", max_new_tokens=5)
    main(["generate", str(talk), "--prompts", str(file), *MORE])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"prompt": text, "completion": speaker.say(speaker.tokens(text))} for text in ("a b", "c")
    ]
    main(["generate", str(talk), "--prompts", str(file), "--chat", *MORE])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completion"] for row in rows] == [answer(speaker, "a b"), answer(speaker, "c")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("\n", "has no prompts; write one a line"),
        ("{\n", "line 1: is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected an object with either `prompt` or"),
        ('{"prompt": ["a"]}\n', "line 1: `prompt` is list, expected str"),
        ('{"prompt": "a"}\n{"prompt": "' + "b " * 40 + '"}\n', "row 2: the prompt has 40 tokens"),
    ],
)
def test_a_damaged_file_is_told(
    talk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(SystemExit):
        main(["generate", str(talk), "--prompts", str(file), *MORE])
    assert f"{file}: {told}" in capsys.readouterr().err
