"""A bundle's manifest: what is in the bundle, as JSON that a person can read."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from fusionkit.bundles.format import FORMAT, MANIFEST, VERSIONS
from fusionkit.bundles.part_file import FileRecord
from fusionkit.checkpoints.adapters.modules import AdapterSpace
from fusionkit.checkpoints.architecture import Kind
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.json_text import json_text
from fusionkit.checkpoints.safetensors_file import tensor_bytes
from fusionkit.checkpoints.stacks import rows_of
from fusionkit.errors import BundleError, WrongBaseError, listing
from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.roles import Role

_PIECE = 1 << 20
_OPTIONAL = ("stacks", "rename", "ignore", "kinds", "architecture", "variant", "dequantized")
"""Keys of the base that are written only where there is something to say."""


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base: what it must be for the bundle's deltas to fit.

    Attributes:
        dtype: torch's name for it, `float32`.
        shape: its shape.
        role: how its deltas are kept; see `fusionkit.task_vectors.roles`.
        sha256: the first 16 hex digits of the SHA-256 of its bytes.
    """

    dtype: str
    shape: list[int]
    role: Role
    sha256: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"unknown role '{self.role}'")
        if not all(isinstance(size, int) and 0 <= size < 1 << 63 for size in self.shape):
            raise ValueError(f"impossible shape {self.shape}")


@dataclass(frozen=True)
class BaseRecord:
    """The base model's identity.

    Attributes:
        source: the path it was read from, or what it was in memory.
        strip_prefix: as given to `Checkpoint.of`.
        add_prefix: as given to `Checkpoint.of`.
        tensors: its tensors by name, private ones left out.
        tied: tied name → name of the tensor that it shares.
        space: where adapters are what is compressed, how they make the base's weights; their
            initial tensors are among `tensors`.
        stacks: name of a stack of experts → how many matrices of it are among `tensors`.
        rename: as given to `Family`.
        ignore: as given to `Family`.
        kinds: name of a matrix, or of a stack → what holds it in the model's class; see
            `Architecture`. Empty where that was not known.
        architecture: the class's record, from which it can be built again.
        variant: as given to `Checkpoint.of`.
        dequantized: it was quantised, and read as the unquantised model.
    """

    source: str
    strip_prefix: str
    add_prefix: str
    tensors: dict[str, BaseTensor]
    tied: dict[str, str]
    space: AdapterSpace | None = None
    stacks: dict[str, int] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    kinds: dict[str, Kind] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    dequantized: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.tied.values()) - self.tensors.keys():
            raise ValueError(f"tied to unknown tensors: {sorted(unknown)}")
        if unknown := rows_of(self.stacks).keys() - self.tensors.keys():
            raise ValueError(f"stacks of unknown tensors: {sorted(unknown)}")

    @classmethod
    def of(cls, family: Family) -> "BaseRecord":
        """Fingerprint a family's base: one read of each tensor, shared out like a pass."""
        base, workers = family.base, family.workers
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
            family.tied,
            family.space,
            stacks=family.stacks,
            rename=family.rename,
            ignore=list(family.ignore),
            kinds={n: kind for n, kind in known.kinds.items() if n in seen} if known else {},
            architecture=dict(known.record) if known else {},
            variant=base.variant,
            dequantized=base.dequantized,
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


@dataclass(frozen=True)
class CalibrationRecord:
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
    objective: str
    method: str
    rows: int
    seed: int
    epochs: int
    loss_before: float
    loss_after: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = str if name in ("objective", "method") else int | float
            if name in ("shift", "scale") and value is None:
                continue
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}")  # noqa: TRY004


@dataclass(frozen=True)
class TaskRecord:
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
    private: list[str]
    private_bytes: int
    checkpoint_bytes: int
    calibration: CalibrationRecord | None = None
    added: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
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
    private: list[str]
    frozen: list[str]
    shared: FileRecord | None
    tasks: dict[str, TaskRecord]

    def __post_init__(self) -> None:
        for record in self.tasks.values():
            if unknown := record.added.keys() - self.base.tensors.keys():
                raise ValueError(f"rows added to unknown tensors: {sorted(unknown)}")
            if not all(
                isinstance(rows, int) and 0 < rows < 1 << 63 for rows in record.added.values()
            ):
                raise ValueError(f"impossible numbers of added rows: {record.added}")

    @property
    def _version(self) -> int:
        """The oldest that can say what is in it."""
        files = [self.shared, *(record.file for record in self.tasks.values())]
        if any(file and file.packed for file in files):
            return 6
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
            **dataclasses.asdict(self),
        }
        records = content["tasks"].values()
        for file in (content["shared"], *(record["file"] for record in records)):
            if file and not file["packed"]:
                file.pop("packed")
        for record in records:
            if record["calibration"] is None:
                record.pop("calibration")
            if not record["added"]:
                record.pop("added")
        for key in ("space", *_OPTIONAL):
            if not content["base"][key] or key == "space":
                content["base"].pop(key)
        if self.base.space:
            content["base"]["space"] = self.base.space.to_json()
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
            raw = path.read_bytes()
            if vouch:
                vouch(raw)
            content: dict[str, Any] = json.loads(raw)
        except FileNotFoundError as error:
            raise BundleError(
                f"{folder}: not a bundle (it has no {MANIFEST}); make one with 'fusionkit compress'"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path}: not readable as JSON ({error}); copy it again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BundleError(f"{path}: not a FusionKit bundle's manifest")
        if content.get("format_version") not in VERSIONS:
            raise BundleError(
                f"{path}: has format version {content.get('format_version')}, this FusionKit reads "
                f"versions up to {VERSIONS[-1]}; install the FusionKit that wrote it"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise BundleError(
                f"{path}: was changed since it was written (checksum differs); copy or "
                "compress it again"
            )
        try:
            return cls._from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{path}: malformed ({error!r}); compress again") from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> "Manifest":
        base = content["base"]
        return cls(
            codec=content["codec"],
            base=BaseRecord(
                source=base["source"],
                strip_prefix=base["strip_prefix"],
                add_prefix=base["add_prefix"],
                tensors={name: BaseTensor(**tensor) for name, tensor in base["tensors"].items()},
                tied=base["tied"],
                space=AdapterSpace.from_json(base["space"]) if base.get("space") else None,
                **{key: base[key] for key in _OPTIONAL if base.get(key)},
            ),
            private=content["private"],
            frozen=content["frozen"],
            shared=FileRecord(**content["shared"]) if content["shared"] else None,
            tasks={task: _task_record(record) for task, record in content["tasks"].items()},
        )


def _task_record(record: dict[str, Any]) -> TaskRecord:
    learned = record.get("calibration")
    calibration = CalibrationRecord(**learned) if learned else None
    return TaskRecord(
        **{**record, "file": FileRecord(**record["file"]), "calibration": calibration}
    )


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
