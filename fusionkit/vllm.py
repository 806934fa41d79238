"""vLLM serves a bundle's tasks: a request that names one gets its adapter, made at first use.

vLLM calls `register` as it starts (entry point `vllm.general_plugins`), in each of its processes;
without FUSIONKIT_VLLM_BUNDLE it does nothing. Where LoRAs may come at run time
(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1), vLLM asks its resolvers for a model that it does not know.
This module is imported by vLLM alone, whose interface it is written to (`vllm.lora.resolver` and
`vllm.lora.request` of 0.33).
"""

import asyncio
import logging
import os
from hashlib import sha256
from pathlib import Path
from threading import Lock

from filelock import FileLock
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.changing import current
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.bundles.hub import base_in_cache, is_name
from fusionkit.bundles.manifest import Manifest
from fusionkit.bundles.served_folder import alike
from fusionkit.checkpoints.adapters.adapter import CONFIG
from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import BundleError, FusionKitError, in_line

BUNDLE = "FUSIONKIT_VLLM_BUNDLE"
BASE = "FUSIONKIT_VLLM_BASE"
CACHE = "FUSIONKIT_VLLM_CACHE"
RANK = "FUSIONKIT_VLLM_RANK"
_IDS = (1 << 31) - 1
"""vLLM keeps ids in int32."""
_log = logging.getLogger("vllm.fusionkit")


class BundleResolver(LoRAResolver):  # type: ignore[misc]
    """Makes an adapter of a bundle's task when a request names the task.

    The model that vLLM serves must be the bundle's base, to the bit. An adapter is written once,
    whole or not at all, into a folder named by a digest of all that it is made of, so that a task
    that has changed gets another. vLLM asks for a name until it has its adapter, and again after
    `POST /v1/unload_lora_adapter`.

    Args:
        bundle: the bundle's folder.
        cache: where adapters are written; by default in the user's cache folder.
        base: the bundle's base, where vLLM serves it in another form, quantised, say; what vLLM
            serves is then not looked at.
        rank: cut deltas to this rank, where the codec has no factors.

    Raises:
        BundleError: the folder holds no bundle.
    """

    def __init__(
        self,
        bundle: str | Path,
        cache: str | Path | None = None,
        base: str | None = None,
        rank: int | None = None,
    ) -> None:
        own = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fusionkit" / "vllm"
        self._bundle = Bundle.load(bundle)
        self._cache, self._base, self._rank = Path(written_out(str(cache or own))), base, rank
        self._source: str | None = None
        self._ids: dict[int, str] = {}
        self._lock = Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """A task's adapter.

        Args:
            base_model_name: the model that vLLM serves: a folder, or a name on the Hub.
            lora_name: the `model` of a request.

        Returns:
            None where the bundle has no such task; or the task can't be an adapter, or vLLM serves
            another base, which is logged.
        """
        try:
            return await asyncio.to_thread(self._resolve, base_model_name, lora_name)
        except FusionKitError as error:
            _log.error("no adapter of FusionKit's task '%s': %s", lora_name, error)
            return None

    def _resolve(self, base_model_name: str, task: str) -> LoRARequest | None:
        manifest = current(self._bundle.path)
        if task not in manifest.tasks:
            return None
        digest = _digest(manifest, task, self._rank)
        folder = self._cache.resolve() / digest[:32]
        with self._lock:
            bundle = self._with_base(manifest, base_model_name)
            self._cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not (folder / CONFIG).is_file():
                    self._export(bundle, task, folder, base_model_name)
            return LoRARequest(lora_name=task, lora_int_id=self._id(digest), lora_path=str(folder))

    def _with_base(self, manifest: Manifest, base_model_name: str) -> Bundle:
        """The bundle as it is now, over the base that vLLM serves, checked when it is read."""
        source = self._base or base_model_name
        if source != self._source or manifest.text() != self._bundle.manifest.text():
            found = source
            if not Path(source).exists() and is_name(source):
                found = base_in_cache(f"hf://{source}")  # vLLM has downloaded it
            self._bundle, self._source = Bundle.load(self._bundle.path, found), source
        return self._bundle

    def _export(self, bundle: Bundle, task: str, folder: Path, base_name: str) -> None:
        left_out = export_adapter(
            bundle, task, folder, rank=self._rank, for_server="vllm", base_name=base_name
        )
        _log.info("adapter of FusionKit's task '%s': %s", task, folder)
        if left_out:
            _log.warning(
                "the adapter of task '%s' leaves out what vLLM's adapters can't hold, so that its "
                "answers may not be the task's own: %s",
                task,
                in_line(alike(left_out), 20),
            )

    def _id(self, digest: str) -> int:
        """A number of the adapter's own, the same in every process that has met no other."""
        number = int(digest, 16) % _IDS + 1
        while self._ids.setdefault(number, digest) != digest:
            number = number % _IDS + 1
        return number


def register() -> None:
    """Register a resolver for the bundle that FUSIONKIT_VLLM_BUNDLE names.

    FUSIONKIT_VLLM_CACHE, FUSIONKIT_VLLM_BASE and FUSIONKIT_VLLM_RANK are the resolver's settings.

    Raises:
        BundleError: it names no bundle, or the rank is no number.
    """
    path = os.environ.get(BUNDLE)
    if not path:
        return
    rank = os.environ.get(RANK, "")
    if rank and not (rank.isdecimal() and int(rank)):
        raise BundleError(f"{RANK} is '{rank}'; expected a whole number, 1 or more")
    resolver = BundleResolver(
        path, os.environ.get(CACHE), os.environ.get(BASE), int(rank) if rank else None
    )
    LoRAResolverRegistry.register_resolver("FusionKit", resolver)


def _digest(manifest: Manifest, task: str, rank: int | None) -> str:
    """SHA-256 over base, codec, shared parts, the task's, and rank: what an adapter is made of."""
    record = manifest.tasks[task]
    shared = manifest.shared.header_sha256 if manifest.shared else ""
    parts = (
        task,
        manifest.base.fingerprint,
        manifest.codec,
        shared,
        record.file.header_sha256,
        rank,
    )
    return sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()
