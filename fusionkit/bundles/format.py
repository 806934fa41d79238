"""The format of a bundle: a folder that holds a family's compressed deltas.

    manifest.json           what is in it: codec, base, tasks, sizes, checksums (manifest.py)
    shared.safetensors      the parts that all tasks share; absent if there are none
    task-<name>.safetensors one per task: its parts, private and exact tensors, rows that it added
                            to the vocabulary; <name> is percent-encoded, and cut where it is too
                            long for a file's name
    manifest.json.minisig   the manifest's signature, where there is one (signature.py)

All tensor files are safetensors (part_file.py); of codecs with parts of a few bytes, small ones
are packed in one tensor (small_parts.py). A tensor's parts are keyed `<tensor>/<part>`;
the part `tensor` is reserved for private and exact tensors, stored whole. Parts of the whole model
are keyed `/<part>`, the initial tensors of adapters, where no seed makes them again,
`start:<tensor>/tensor` in the shared file, the rows that a task added to a tensor of its vocabulary
`rows:<tensor>/tensor` in its own. A file beside a fine-tune's weights (its configuration, its
tokenizer) that the base has not, or otherwise, is keyed `file:<name>/tensor` in the task's: uint8,
compressed by zlib; of no length, where a file of the base is not the task's (side_files.py). No
other reader takes it for a tensor's. The base is not in the bundle: it is known by
fingerprint and checked on use. Files are written under temporary names and renamed, the manifest
last: whatever is interrupted, a bundle that can be opened is whole.
"""

from collections.abc import Iterable
from hashlib import sha256
from urllib.parse import quote

from fusionkit.checkpoints.json_text import is_text
from fusionkit.checkpoints.path_text import one_form
from fusionkit.errors import BundleError

FORMAT = "fusionkit-bundle"
VERSIONS = (1, 2, 3, 4, 5, 6, 7)
"""What can be read; 7 is written where a file's small parts are packed, as 6 was before sketches
had trellises; 5 where a task added rows to the vocabulary; 4 where stacks of experts are split into
their matrices, or a user's `rename` or `ignore` applies; 3 where tasks were calibrated; 2 where
adapters are what is compressed; 1 otherwise."""

MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
INITIAL = "start:"
"""Put before an adapter tensor's name: its initial value, among the shared parts."""
SIDE_FILE = "file:"
"""Put before the name of a file beside a task's weights, among the task's parts."""
ADDED = "rows:"
"""Put before a tensor's name: the rows that a task added to it, among the task's own parts."""


_LONGEST = 232
"""Of an encoded name: with what is around it while it is written, it is a name of 255 bytes."""


def task_file(task: str) -> str:
    """The name of a task's file; never a path, whatever the task is called.

    A name that is too long for a file is cut, and told by a digest behind a `=`, which no encoded
    name holds.
    """
    name = quote(task, safe="", errors="surrogatepass")
    if len(name) > _LONGEST:
        digest = sha256(task.encode(errors="surrogatepass")).hexdigest()[:32]
        name = f"{name[:160]}={digest}"
    return f"task-{name}.safetensors"


def refuse_alike(tasks: Iterable[str]) -> None:
    """Refuse tasks that nobody can tell from each other, nor some file systems.

    Raises:
        BundleError: two names differ in their Unicode form alone, or one is no text.
    """
    known: dict[str, str] = {}
    for task in tasks:
        if not is_text(task):
            raise BundleError(
                f"task {task!a}: its name is not UTF-8, which bundles keep names in; rename it"
            )
        other = known.setdefault(one_form(task), task)
        if other != task:
            raise BundleError(
                f"tasks {other!a} and {task!a} have one name ('{task}') in two Unicode "
                "forms; rename one of them"
            )
