"""`fusionkit generate`."""

import json
import sys
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.disk import check_writable
from fusionkit.checkpoints.output_folder import new_file
from fusionkit.checkpoints.paths import open_path, refuse_existing
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import DataError, FusionKitError
from fusionkit.reuse.prompts import Messages
from fusionkit.reuse.speaker import Speaker, open_speaker


def run(args: list[str]) -> None:
    """Have a task's language model answer the prompts of a file."""
    call(generate, args, positional="bundle")


def generate(
    bundle: str,
    prompts: str,
    task: str | None = None,
    out: str | None = None,
    base: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Have a task's language model answer the prompts of a file, in batches.

    Args:
        bundle: the bundle's folder, or its name on the Hugging Face Hub.
        prompts: a text file, a prompt a line; or .jsonl, whose rows have `prompt`, a text that is
            continued, or `messages`, a conversation for the chat template.
        task: who answers; by default the bundle's first task.
        out: a .jsonl file: the rows, each with its `completion`; by default they are printed.
        base: the base model, if it is not where it was when the bundle was made.
        chat: each prompt is a user's message, for the chat template.
        max_new_tokens: how long an answer may be.
        temperature: 0: the likeliest token, always; else tokens are drawn.
        seed: of what is drawn.
        batch_size: how many are answered at once.
        device: where to run: cpu, cuda; by default the GPU where there is one.
        dtype: fp32, fp16 or bf16; by default the base's.
        overwrite: replace the file if it is there.
    """
    import torch

    if batch_size < 1:
        raise FusionKitError(f"expected a batch_size of at least 1, got {batch_size}")
    if out is not None:
        refuse_existing(out, overwrite, "choose another name, or set --overwrite")
        check_writable(out)
    rows = read_prompts(open_path(prompts))
    speaker = open_speaker(
        bundle,
        task,
        base,
        device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    torch.manual_seed(seed)
    tokens = [_tokens(speaker, row, chat, f"{prompts}: row {n}") for n, row in enumerate(rows, 1)]
    found = dict(speaker.answers(tokens, batch_size))
    lines = [
        json.dumps({**row, "completion": found[place]}, ensure_ascii=False) + "\n"
        for place, row in enumerate(rows)
    ]
    if out is None:
        sys.stdout.writelines(lines)
        return
    path = open_path(out)
    with new_file(path) as new:
        new.write_text("".join(lines), encoding="utf-8")
    report.show(f"written: {path} ({len(lines)} answers of {speaker.task})")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts: each has `prompt` or `messages`, of a text file a line.

    Raises:
        DataError: the file is missing, empty or damaged, or a row has neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file (relative to {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error})") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: has no prompts; write one a line")
    if path.suffix not in (".jsonl", ".ndjson"):
        return [{"prompt": line} for line in lines if line.strip()]
    return [_row(line, f"{path}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error}); write one object a line") from error
    given = [key for key in ("prompt", "messages") if isinstance(row, dict) and row.get(key)]
    if len(given) != 1:
        raise DataError(f"{where}: expected an object with either `prompt` or `messages`")
    kind: type = str if given[0] == "prompt" else list
    if not isinstance(row[given[0]], kind):
        raise DataError(
            f"{where}: `{given[0]}` is {type(row[given[0]]).__name__}, expected {kind.__name__}"
        )
    found: dict[str, Any] = row
    return found


def _tokens(speaker: Speaker, row: dict[str, Any], chat: bool, where: str) -> list[int]:
    prompt: str | Messages = row.get("prompt") or row["messages"]
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        return speaker.tokens(prompt)
    except FusionKitError as error:
        raise DataError(f"{where}: {error}") from error
