"""A bundle's manifest: what is in the bundle, as JSON that a person can read.

The classes here are its schema: a file's content becomes them, or is refused, by their fields'
types and limits alone, and what a field has by default is not written.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct, field

from fusionkit.bundles.format import FORMAT, MANIFEST, VERSIONS
from fusionkit.bundles.part_file import FileRecord
from fusionkit.checkpoints.adapters.modules import AdapterSpace
from fusionkit.checkpoints.architecture import Kind
from fusionkit.checkpoints.checkpoint import MOST_TENSORS, Checkpoint
from fusionkit.checkpoints.json_text import is_text, json_text, parsed_json, read_bytes, refuse_deep
from fusionkit.checkpoints.names import MOST_PATTERNS, MOST_REPLACED
from fusionkit.checkpoints.safetensors_file import Size, tensor_bytes
from fusionkit.checkpoints.stacks import rows_of
from fusionkit.errors import BundleError, WrongBaseError, listing
from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.roles import Role

_PIECE = 1 << 20
_LARGEST = 256 << 20
"""Bytes of a manifest."""
_LEVELS = 128
"""How deep it may be; what codecs, classes and adapters say in it has a limit of its own."""

Name = Annotated[str, Meta(max_length=4096)]
Rows = Annotated[int, Meta(gt=0, lt=1 << 62)]
Dtype = Annotated[str, Meta(pattern="^[a-z0-9_]{1,32}$")]
Digest = Annotated[str, Meta(max_length=64)]
Ties = Annotated[dict[Name, Name], Meta(max_length=MOST_TENSORS)]
Counts = Annotated[dict[Name, Rows], Meta(max_length=MOST_TENSORS)]
Replacement = Annotated[str, Meta(max_length=MOST_REPLACED)]
Renaming = Annotated[dict[Name, Replacement], Meta(max_length=MOST_PATTERNS)]
Patterns = Annotated[list[Name], Meta(max_length=1 << 20)]


class _Record(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """What a manifest says of something: exactly these keys, those with a default left out."""


class BaseTensor(_Record, frozen=True):
    """One tensor of the base: what it must be for the bundle's deltas to fit.

    Attributes:
        dtype: torch's name for it, `float32`.
        shape: its shape.
        role: how its deltas are kept; see `fusionkit.task_vectors.roles`.
        sha256: the first 16 hex digits of the SHA-256 of its bytes.
    """

    dtype: Dtype
    shape: Annotated[list[Size], Meta(max_length=16)]
    role: Role
    sha256: Digest

    def __post_init__(self) -> None:
        if math.prod(self.shape) >= 1 << 62:
            raise ValueError(f"a shape of too many entries: {self.shape}")


class BaseRecord(_Record, frozen=True):
    """The base model's identity.

    Attributes:
        source: the path it was read from, or what it was in memory.
        strip_prefix: as given to `Checkpoint.of`.
        add_prefix: as given to `Checkpoint.of`.
        tensors: its tensors by name, private ones left out.
        tied: tied name → name of the tensor that it shares.
        stacks: name of a stack of experts → how many matrices of it are among `tensors`.
        rename: as given to `Family`.
        ignore: as given to `Family`.
        kinds: name of a matrix, or of a stack → what holds it in the model's class; see
            `Architecture`. Empty where that was not known.
        architecture: the class's record, from which it can be built again.
        variant: as given to `Checkpoint.of`.
        dequantized: it was quantised, and read as the unquantised model.
        adapters: `space`, as JSON; its initial tensors are among `tensors`.
    """

    source: Name
    strip_prefix: Name
    add_prefix: Name
    tensors: Annotated[dict[Name, BaseTensor], Meta(max_length=MOST_TENSORS)]
    tied: Ties
    stacks: Counts = field(default_factory=dict)
    rename: Renaming = field(default_factory=dict)
    ignore: Patterns = field(default_factory=list)
    kinds: Annotated[dict[Name, Kind], Meta(max_length=MOST_TENSORS)] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    variant: Name | None = None
    dequantized: bool = False
    adapters: dict[str, Any] = field(default_factory=dict, name="space")

    def __post_init__(self) -> None:
        if unknown := set(self.tied.values()) - self.tensors.keys():
            raise ValueError(f"tied to unknown tensors: {sorted(unknown)}")
        if sum(self.stacks.values()) > len(self.tensors):
            raise ValueError("stacks of more matrices than there are tensors")
        if unknown := rows_of(self.stacks).keys() - self.tensors.keys():
            raise ValueError(f"stacks of unknown tensors: {sorted(unknown)}")
        refuse_deep(self.architecture)
        refuse_deep(self.adapters)
        if self.space and (unknown := set(self.space.layout.tensors) - self.tensors.keys()):
            raise ValueError(f"adapters of unknown tensors: {sorted(unknown)}")

    @cached_property
    def space(self) -> AdapterSpace | None:
        """Where adapters are what is compressed, how they make the base's weights."""
        return AdapterSpace.from_json(self.adapters) if self.adapters else None

    @classmethod
    def of(cls, family: Family) -> "BaseRecord":
        """Fingerprint a family's base: one read of each tensor, shared out like a pass.

        Raises:
            BundleError: its path, or a tensor's name, is no text.
        """
        base, workers = family.base, family.workers
        for name in (base.label, *family.roles):
            if not is_text(name):
                raise BundleError(
                    f"{name!a}: is not UTF-8, which bundles keep names and paths in; rename it"
                )
        sizes = {name: base.specs[name].numel for name in family.roles}
        own = {name: sizes[name] for name in workers.share(sizes)}
        found = dict(workers.run(lambda name: _sha256(base, name), own, counted=False))
        digests = {n: d for each in workers.processes.gather(found) for n, d in each.items()}
        tensors = {
            name: BaseTensor(
                _dtype_name(base.specs[name].dtype),
                list(base.specs[name].shape),
                role,
                digests[name],
            )
            for name, role in family.roles.items()
        }
        known = base.architecture
        seen = tensors.keys() | family.stacks.keys() | family.tied.keys()
        return cls(
            base.label,
            base.strip_prefix,
            base.add_prefix,
            tensors,
            dict(family.tied),
            stacks=family.stacks,
            rename=family.rename,
            ignore=list(family.ignore),
            kinds={n: kind for n, kind in known.kinds.items() if n in seen} if known else {},
            architecture=dict(known.record) if known else {},
            variant=base.variant,
            dequantized=base.dequantized,
            adapters=family.space.to_json() if family.space else {},
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and values of all tensors."""
        lines = [
            f"{name} {t.dtype} {t.shape} {t.sha256}\n" for name, t in sorted(self.tensors.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Number of compressible parameters of one task."""
        return sum(torch.Size(t.shape).numel() for t in self.tensors.values() if t.role == "delta")

    def names(self, role: Role) -> list[str]:
        """Names of the tensors with this role."""
        return [name for name, tensor in self.tensors.items() if tensor.role == role]

    def check(self, base: Checkpoint, label: str) -> None:
        """Check that a model is the base, tensor by tensor, to the bit.

        Raises:
            WrongBaseError: it is not; the message names the first tensors that differ.
        """
        findings = []
        for name, expected in self.tensors.items():
            if name not in base:
                # Models differ in which buffers they save, and what is frozen no task needs.
                if expected.role == "delta":
                    findings.append(f"'{name}' is missing")
                continue
            found = base.specs[name]
            if list(found.shape) != expected.shape:
                findings.append(f"'{name}' has shape {list(found.shape)}, not {expected.shape}")
            elif _dtype_name(found.dtype) != expected.dtype:
                findings.append(
                    f"'{name}' is {_dtype_name(found.dtype)}, not {expected.dtype} (load the base "
                    "as it was; lower the precision after)"
                )
            elif _sha256(base, name) != expected.sha256:
                findings.append(f"'{name}' has other values")
        if findings:
            hint = ""
            if self.dequantized and not base.dequantized:
                hint = "\nit was read dequantised: give it as Checkpoint.of(…, dequantize=True)"
            raise WrongBaseError(
                f"{label} is not the base that this bundle was made from ({self.source}):"
                f"{listing(findings)}{hint}"
            )


class CalibrationRecord(_Record, frozen=True):
    """What calibration did for one task.

    Attributes:
        shift: DBMS's α; None of another codec, whose scales are in its payload.
        scale: DBMS's β; None of another codec.
        objective: as in `fusionkit.Calibration`.
        method: as in `fusionkit.Calibration`.
        rows: calibration rows that were used.
        seed: that drew them.
        epochs: steps, or evaluations, taken.
        loss_before: the objective as it was encoded; of DBMS, of the wrapped codec alone.
        loss_after: that of what is in the bundle.
    """

    shift: float | None
    scale: float | None
    objective: Name
    method: Name
    rows: Size
    seed: int
    epochs: Size
    loss_before: float
    loss_after: float


class TaskRecord(_Record, frozen=True):
    """What the manifest keeps of one task.

    Attributes:
        file: its payload file's size and header digest.
        private: names of its private tensors.
        private_bytes: bytes of its private and exact tensors, stored whole.
        checkpoint_bytes: bytes on disk of the full fine-tuned checkpoint.
        calibration: what was learned for it; None where nothing was.
        added: name of a tensor of the base that it added rows to → how many.
    """

    file: FileRecord
    private: Patterns
    private_bytes: Size
    checkpoint_bytes: Size
    calibration: CalibrationRecord | None = None
    added: Counts = field(default_factory=dict)


class Manifest(_Record, frozen=True):
    """Everything that a bundle says of itself.

    Attributes:
        codec: the codec's config; see `fusionkit.registry.to_config`.
        base: the base's identity.
        private: patterns of private tensors.
        frozen: patterns of frozen tensors.
        shared: the shared file's record, or None where the codec shares nothing.
        tasks: task name → record.
    """

    codec: Config
    base: BaseRecord
    private: Patterns
    frozen: Patterns
    shared: FileRecord | None
    tasks: Annotated[dict[Name, TaskRecord], Meta(max_length=1 << 16)]

    def __post_init__(self) -> None:
        for record in self.tasks.values():
            if unknown := record.added.keys() - self.base.tensors.keys():
                raise ValueError(f"rows added to unknown tensors: {sorted(unknown)}")
        refuse_deep(self.codec)

    @property
    def _version(self) -> int:
        """The oldest that can say what is in it."""
        files = [self.shared, *(record.file for record in self.tasks.values())]
        if any(file and file.packed for file in files):
            return 7
        if any(record.added for record in self.tasks.values()):
            return 5
        if self.base.stacks or self.base.rename or self.base.ignore:
            return 4
        if any(record.calibration for record in self.tasks.values()):
            return 3
        return 2 if self.base.space else 1

    def text(self) -> str:
        """The manifest as JSON, its own checksum included."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": self._version,
            "base_fingerprint": self.base.fingerprint,
            **msgspec.to_builtins(self),
        }
        return json_text({**content, "checksum": _checksum(content)}) + "\n"

    def write(self, folder: Path) -> None:
        """Write into a bundle's folder: to a temporary name, then renamed."""
        temporary = folder / (MANIFEST + ".tmp")
        try:
            temporary.write_text(self.text())
            os.replace(temporary, folder / MANIFEST)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: what is shared, and every task's file."""
        files = [record.file for record in self.tasks.values()]
        return sum(file.bytes for file in [*files, *filter(None, [self.shared])])

    @classmethod
    def read(cls, folder: Path, vouch: Callable[[bytes], None] | None = None) -> "Manifest":
        """Read and check a bundle's manifest; `vouch` is first called on its bytes, and may raise.

        Raises:
            BundleError: there is none, it was changed, or it is of a newer format.
        """
        path = folder / MANIFEST
        try:
            content = _content(path, vouch)
        except FileNotFoundError as error:
            raise BundleError(
                f"{folder}: not a bundle (it has no {MANIFEST}); make one with 'fusionkit compress'"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path}: not readable as JSON ({error}); copy it again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BundleError(f"{path}: not a FusionKit bundle's manifest")
        version = content.get("format_version")
        if version not in VERSIONS:
            raise BundleError(
                f"{path}: has format version {str(version)[:32]}, this FusionKit reads "
                f"versions up to {VERSIONS[-1]}; install the FusionKit that wrote it"
            )
        try:
            same = content.pop("checksum", None) == _checksum(content)
            del content["format"], content["format_version"]
            content.pop("base_fingerprint", None)  # told for people
            found = msgspec.convert(content, cls) if same else None
        except (msgspec.ValidationError, RecursionError) as error:
            raise BundleError(f"{path}: malformed ({error}); compress again") from error
        if found is None:
            raise BundleError(
                f"{path}: was changed since it was written (checksum differs); copy or "
                "compress it again"
            )
        return found


def _content(path: Path, vouch: Callable[[bytes], None] | None) -> Any:
    """What a file says, as JSON.

    Raises:
        OSError: it can't be read.
        ValueError: it is no JSON, or larger than any manifest.
    """
    raw = read_bytes(path, _LARGEST)
    if vouch:
        vouch(raw)
    return parsed_json(raw, _LEVELS)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(base: Checkpoint, name: str) -> str:
    """Of a tensor's values, read piece by piece."""
    digest, pieces, count = hashlib.sha256(), base.pieces(name), base.specs[name].numel
    for start in range(0, count, _PIECE):
        digest.update(tensor_bytes(pieces(slice(start, min(start + _PIECE, count)))))
    return digest.hexdigest()[:16]
