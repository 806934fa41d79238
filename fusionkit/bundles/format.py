"""The format of a bundle: a folder that holds a family's compressed deltas.

    manifest.json           what is in it: codec, base, tasks, sizes, checksums (manifest.py)
    shared.safetensors      the parts that all tasks share; absent if there are none
    task-<name>.safetensors one per task: its parts, private and exact tensors; <name> is
                            percent-encoded

All tensor files are plain safetensors (part_file.py). A tensor's parts are keyed `<tensor>/<part>`;
the part `tensor` is reserved for private and exact tensors, stored whole. Parts of the whole model
are keyed `/<part>`, the initial tensors of adapters, where no seed makes them again,
`start:<tensor>/tensor` in the shared file. A file beside a fine-tune's weights (its configuration,
its tokenizer) that the base has not, or otherwise, is keyed `file:<name>/tensor` in the task's:
uint8, compressed by zlib; of no length, where a file of the base is not the task's (side_files.py).
No other reader takes it for a tensor's. The base is not in the bundle: it is known by
fingerprint and checked on use. Files are written under temporary names and renamed, the manifest
last: whatever is interrupted, a bundle that can be opened is whole.
"""

from urllib.parse import quote

FORMAT = "fusionkit-bundle"
VERSIONS = (1, 2, 3, 4)
"""What can be read; 4 is written where stacks of experts are split into their matrices, or a
user's `rename` or `ignore` applies; 3 where tasks were calibrated; 2 where adapters are what is
compressed; 1 otherwise."""

MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
INITIAL = "start:"
"""Put before an adapter tensor's name: its initial value, among the shared parts."""
SIDE_FILE = "file:"
"""Put before the name of a file beside a task's weights, among the task's parts."""


def task_file(task: str) -> str:
    """The name of a task's file; never a path, whatever the task is called."""
    return f"task-{quote(task, safe='', errors='surrogatepass')}.safetensors"
