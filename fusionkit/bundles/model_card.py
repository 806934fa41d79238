"""The model card of a bundle on the Hugging Face Hub."""

import json
from collections.abc import Mapping, Sequence

from fusionkit.bundles.hub import MARK
from fusionkit.bundles.manifest import Manifest

Scores = Mapping[str, Sequence[str]]
"""Task → what the card's table says of its scores, a cell for each of the titles."""


def model_card(
    name: str,
    manifest: Manifest,
    base_model: str | None,
    titles: Sequence[str] = (),
    scores: Scores | None = None,
    signed: bool = False,
) -> str:
    """A bundle's card: what is in it, how large, how good, and how each task is used.

    Args:
        name: the repository's.
        manifest: the bundle's.
        base_model: the base's name on the Hub; None where it is not there.
        titles: of the columns of scores.
        scores: by task.
        signed: the bundle is.
    """
    head = ["library_name: fusionkit", "tags:", "- fusionkit", "- delta-compression"]
    if base_model:
        head.insert(0, f"base_model: {base_model}")
    columns = ("task", "bytes", "× smaller", *titles)
    rows = [
        (
            f"`{task}`",
            f"{record.file.bytes:,}",
            f"{record.checkpoint_bytes / max(record.file.bytes, 1):.1f}",
            *((scores or {}).get(task) or [""] * len(titles)),
        )
        for task, record in manifest.tasks.items()
    ]
    if manifest.shared:
        rows.append(("(shared by all)", f"{manifest.shared.bytes:,}", *[""] * (len(columns) - 2)))
    table = "\n".join(
        f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)
    )
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "one base"
    given = "" if base_model else ', base="PATH/OF/THE/BASE"'
    uses = "\n".join(
        f'model = fusionkit.load("{name}", {json.dumps(task, ensure_ascii=False)}{given})'
        for task in manifest.tasks
    )
    tokenizer = f'fusionkit.tokenizer("{name}", {json.dumps(next(iter(manifest.tasks)))}{given})'
    return f"""---
{chr(10).join(head)}
---
{MARK}

# {name.partition("/")[2]}

{len(manifest.tasks)} models that were fine-tuned from {base}, each as a small compressed delta
(`{manifest.codec["id"]}`), by FusionKit. The base itself is not in here; it is checked by its
fingerprint, `{manifest.base.fingerprint[:16]}…`. Of a task that is asked for, its own file is
downloaded, and no other.{_signed(name) if signed else ""}

{table}

```python
import fusionkit

{uses}
tokenizer = {tokenizer}
```

`fusionkit.switch(model, bundle, task)`, with `bundle = fusionkit.Bundle.from_pretrained("{name}")`,
makes it another task's in place.
"""


def _signed(name: str) -> str:
    return f"""

It is signed with [minisign](https://jedisct1.github.io/minisign/), in `manifest.json.minisig`: by
the public key, `fusionkit.Bundle.from_pretrained("{name}", key="RW…")` opens nothing else."""
