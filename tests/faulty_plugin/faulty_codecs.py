"""Codecs that break the contract, one fault each, and one that tests its edge."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.codecs.base import DeltaCodec, Encoded, Encoder, Parts, SharedParts, TensorCodec
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

KEPT: dict[int, Tensor] = {}
"""What a codec must not have: a memory beside its payload."""


@dataclass(frozen=True)
class Faulty(DeltaCodec):
    """Whole deltas, and one fault.

    Args:
        fault: what is done wrong; `none` keeps to the contract.
    """

    id: ClassVar[str] = "faulty"
    fault: str = "none"

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        calls: list[str] = []

        def encode(vectors: TaskVectors) -> Encoded:
            parts: list[dict[str, Tensor]] = [{"values": v} for v in vectors.stack()]
            name, common = vectors.name, {}
            calls.append(name)
            if self.fault == "name":
                name = "nowhere.weight"
            elif self.fault == "tasks":
                parts = parts[:1]
            elif self.fault in {"tensor", "a/b"}:
                parts = [{self.fault: v["values"]} for v in parts]
            elif self.fault == "dtype":
                parts = [{"values": v["values"].to(torch.complex128)} for v in parts]
            elif self.fault == "shared":
                common = {"common": torch.zeros(1)}
            elif self.fault == "raise" and name == list(family.sizes)[2]:
                raise ZeroDivisionError("in the third tensor")
            elif self.fault == "random":
                parts = [{"values": v["values"] + torch.rand(())} for v in parts]
            elif self.fault == "order":
                parts = [{"values": v["values"] + len(calls)} for v in parts]
            elif self.fault == "writes to the base":
                vectors.base.add_(1)
            elif self.fault == "memory":
                KEPT.update({id(v["values"]): v["values"] for v in parts})
            return Encoded(name, common, parts)

        return Encoder(encode)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        values = parts["values"].clone()
        if self.fault == "writes to the payload":
            return parts["values"].mul_(0.5)
        if self.fault == "infinite":
            return values / 0
        if self.fault == "half":
            return values.half()
        if self.fault == "memory":
            return torch.full(shape, float(len(KEPT)))
        if self.fault == "decoded":
            return values.reshape(1, -1)
        if self.fault == "decoding":
            return values[parts["absent"]]
        return values


@dataclass(frozen=True)
class Lender(TensorCodec):
    """Decodes to the payload's own memory."""

    id: ClassVar[str] = "lender"

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        return {"values": delta}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        return parts["values"].view(shape)


@dataclass
class Changing(TensorCodec):
    """Can be changed after it was made."""

    id: ClassVar[str] = "changing"
    setting: int = 0

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        return {"values": delta}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        return parts["values"]


@dataclass(frozen=True)
class Forgetful(Lender):
    """Loses a setting on the way through JSON."""

    id: ClassVar[str] = "forgetful"
    settings: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", (*self.settings, 0))
