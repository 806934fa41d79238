"""The page of the families: `PYTHONPATH=tests python -m conformance.table > docs/models.md`."""

from itertools import groupby

from conformance.crossing import CODECS, CROSSING
from conformance.families import FAMILIES
from conformance.row import BARE, ModelFamily

_HEAD = """\
# Models

Each family below is built tiny from its config, with nothing downloaded, and taken through the
crossing underneath by `pytest tests/conformance`: whatever kinds of source base and fine-tune come
from, the fine-tuned model's logits come back to float32 rounding, and so does every tensor. The
fine-tune has moved everything that is trained, matrices by rank 2, and BatchNorm's statistics.

A *folder* is what `save_pretrained` writes (of timm, `save_for_hf`), *sharded* the same in several
files, *live* a module in memory, *LoRA* a folder that PEFT saved.
"""
_FOOT = """
Sinks: *state_dict*, loaded by the class's `load_state_dict`; *switch*, `ReuseModule.switch` on a
live model, and back to the base, to the bit; *model*, exported and loaded as the family's library
does; *peft*, exported and loaded by PEFT over the base.
"""
_KINDS = {"timm": "timm", "diffusers": "diffusers"}


def table() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for kind, rows in groupby(FAMILIES, lambda row: row.kind):
        title = _KINDS.get(kind) or f"transformers: {kind}"
        lines += [f"## {title}", "", "| family | class | exact | remarks |", "|---|---|---|---|"]
        lines += [_line(row) for row in rows]
        lines += [""]
    codecs = ", ".join(f"`{codec!r}`" for codec in CODECS.values())
    lines += ["## The crossing", "", f"Codecs: {codecs}.", ""]
    lines += ["| base | fine-tune | codec | sinks |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(each[:3])} | {', '.join(each[3])} |" for each in CROSSING]
    return "\n".join(lines) + "\n" + _FOOT


def _line(row: ModelFamily) -> str:
    exact, remarks = "all", [row.remark] if row.remark else []
    if row.refused:
        exact = "all but what is refused"
        remarks += [_refusal(*each) for each in row.refused.items()]
    return f"| {row.name} | `{row.built}` | {exact} | {'; '.join(remarks)} |"


def _refusal(crossing: str, message: str) -> str:
    if {crossing: message} == BARE:
        return "a full fine-tune as a PEFT adapter: parameters outside a module of their own"
    return f"{crossing}: {message}"


if __name__ == "__main__":
    print(table(), end="")
