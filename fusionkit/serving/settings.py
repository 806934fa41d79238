"""How a server is set up: where it listens, who may ask, and how much."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """How much may be asked.

    Attributes:
        body: bytes of a request, at most.
        upload: bytes of a model that is sent to be added, at most.
        tokens: of an answer, at most.
        rows: of a request, at most.
        seconds: for a request to come in whole, and for its answer.
        stalled: seconds that a client may take nothing of its answer.
        grace: seconds that running requests have to end when the server stops.
    """

    body: int = 1_000_000
    upload: int = 1_000_000_000
    tokens: int = 1024
    rows: int = 256
    seconds: float = 120.0
    stalled: float = 30.0
    grace: float = 30.0


class Keys:
    """Secrets that let in who has one; compared in a time that says nothing of them.

    Args:
        keys: the secrets; empty ones are no secrets.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.strip().encode()) for key in keys if key.strip()]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: bytes) -> bool:
        """Whether a request with this `Authorization` header is let in.

        Args:
            authorization: `Bearer KEY`; empty where there is none.
        """
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found = False
        for each in self._digests:  # all of them, whichever fits
            found |= hmac.compare_digest(each, given)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        bundle: the bundle's folder.
        base: the base model, where it is not where the bundle says.
        host: the interface to listen at.
        port: the port.
        limits: how much may be asked.
        keys: who may ask; none: everyone.
        admin: who may change the tasks; none: nobody.
        tasks_root: where models to be added may be; None: nowhere.
    """

    bundle: Path
    base: str | None
    host: str
    port: int
    limits: Limits
    keys: Keys
    admin: Keys
    tasks_root: Path | None
