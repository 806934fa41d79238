"""Bundles made to do harm: each is refused with a clear error, and runs, imports and opens nothing.

Every attack is one function that spoils a sound bundle. Checksums are made to agree afterwards, as
an attacker would: they guard against damage, not against intent.
"""

import hashlib
import json
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import Json, edit, replace_payload
from torch import Tensor

from fusionkit import EMR, Bundle, MagnitudePrune, Mean
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, FusionKitError, PluginError

BASE = {"w": torch.arange(40.0).view(8, 5), "b": torch.zeros(8), "n": torch.arange(3)}


def bundle_of(codec: DeltaCodec, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tuned: dict[str, dict[str, Tensor]] = {}
    for task in ("x", "y"):
        noise = {name: torch.randn(BASE[name].shape, generator=generator) for name in ("w", "b")}
        tuned[task] = {name: BASE[name] + noise[name] for name in noise}
        tuned[task] |= {"n": BASE["n"] + 1, "head": torch.ones(4)}
    compress(BASE, tuned, codec, folder, private=["head"])
    return folder


@pytest.fixture
def emr(tmp_path: Path) -> Path:
    return bundle_of(EMR(), tmp_path / "emr")


@pytest.fixture
def prune(tmp_path: Path) -> Path:
    return bundle_of(MagnitudePrune(0.3, merge=Mean(), dtype="int8"), tmp_path / "prune")


def edit_header(change: Callable[[Json], object]) -> Callable[[Path], None]:
    """An attack on the header of a task's file."""

    def attack(folder: Path) -> None:
        raw = (folder / "task-x.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        replace_payload(folder, "task-x.safetensors", text, raw[8 + length :])

    return attack


def edit_part(
    key: str, change: Callable[[Tensor], Tensor | None], name: str = "task-x.safetensors"
) -> Callable[[Path], None]:
    """An attack on one part: another tensor in its place, or none."""

    def attack(folder: Path) -> None:
        from safetensors.torch import load_file

        parts = load_file(folder / name)
        changed = change(parts.pop(key))
        if changed is not None:
            parts[key] = changed
        kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        kinds |= {torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8"}
        header: Json = {"__metadata__": {"format": "pt", "digests": ""}}
        data = b""
        for part in sorted(parts, key=lambda k: -parts[k].dtype.itemsize):
            raw = parts[part].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            header[part] = {
                "dtype": kinds[parts[part].dtype],
                "shape": list(parts[part].shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            header["__metadata__"]["digests"] += hashlib.sha256(raw).hexdigest()[:16]
            data += raw
        text = json.dumps(header).encode()
        replace_payload(folder, name, text + b" " * (-len(text) % 8), data)

    return attack


# --- manifests --------------------------------------------------------------------------------


def set_at(*path: str, value: object) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


def rename_task(name: str) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        manifest["tasks"][name] = manifest["tasks"].pop("x")

    return change


TENSOR = ("base", "tensors", "w")
LEARNED = {
    "shift": 0.5,
    "scale": 1.5,
    "objective": "outputs",
    "method": "gradient",
    "rows": 64,
    "seed": 0,
    "epochs": 16,
    "loss_before": 0.5,
    "loss_after": 0.1,
}
MANIFESTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "newer version": (
        set_at("format_version", value=8),
        "has format version 8, this FusionKit reads versions up to 7; install the FusionKit that",
    ),
    "other format": (set_at("format", value="zip"), "not a FusionKit bundle's manifest"),
    "no codec": (lambda m: m.pop("codec"), r"malformed \(.* missing required field `codec`"),
    "codec is text": (set_at("codec", value="emr"), r"malformed \(Expected `object`, got `str`"),
    "codec is a merge": (
        set_at("codec", value={"group": "fusionkit.merges", "id": "mean", "settings": {}}),
        "manifest.json: 'mean' is no codec",
    ),
    "unknown setting": (
        set_at("codec", "settings", value={"levels": 3}),
        "'emr' knows no setting levels; it was written by fusionkit",
    ),
    "settings are a number": (set_at("codec", "settings", value=3), "not a codec's"),
    "tasks are a list": (set_at("tasks", value=[]), "malformed"),
    "tensors are a list": (set_at("base", "tensors", value=[]), "malformed"),
    "unknown field": (set_at(*TENSOR, "extra", value=1), "malformed"),
    "missing field": (lambda m: m["base"]["tensors"]["w"].pop("sha256"), "malformed"),
    "negative shape": (set_at(*TENSOR, "shape", value=[-1, 5]), "malformed"),
    "huge shape": (set_at(*TENSOR, "shape", value=[10**30]), "malformed"),
    "shape of text": (set_at(*TENSOR, "shape", value=["8", "5"]), "malformed"),
    "unknown role": (set_at(*TENSOR, "role", value="root"), "malformed"),
    "calibration of text": (
        set_at("tasks", "x", "calibration", value={**LEARNED, "shift": "far"}),
        "malformed",
    ),
    "unknown calibration": (
        set_at("tasks", "x", "calibration", value={**LEARNED, "warmth": 1}),
        "malformed",
    ),
    "tied to nothing": (set_at("base", "tied", value={"v": "nowhere"}), "malformed"),
    "size is text": (set_at("tasks", "x", "file", "bytes", value="9"), "malformed"),
    "task outside": (rename_task("../../x"), r"task-\.\.%2F\.\.%2Fx\.safetensors: missing"),
    "absolute task": (rename_task("/etc/passwd"), r"task-%2Fetc%2Fpasswd\.safetensors: missing"),
    "task of half a character": (rename_task("\ud800"), "a name in it holds half a character"),
    "source of half a character": (
        set_at("base", "source", value="base\udc80"),
        r"manifest\.json: not readable as JSON \(a name in it holds half a character\)",
    ),
    "dtype of values": (
        set_at("codec", "settings", "dtype", value="fp99"),
        r"manifest\.json: codec\.settings\.dtype: Invalid enum value 'fp99'",
    ),
    "dtype is a list": (
        set_at("codec", "settings", "dtype", value=["fp16"]),
        r"manifest\.json: codec\.settings\.dtype: Expected `str`, got `array`",
    ),
    "stack without end": (
        set_at("base", "stacks", value={"w": 10**15}),
        "stacks of more matrices than there are tensors",
    ),
    "too many entries": (set_at(*TENSOR, "shape", value=[1 << 40, 1 << 40]), "malformed"),
    "configuration without end": (
        set_at("base", "architecture", value=json.loads('{"a":' * 100 + "1" + "}" * 100)),
        r"manifest\.json: malformed \(it is nested deeper than 64 levels",
    ),
}


@pytest.mark.parametrize("attack", MANIFESTS)
def test_a_malformed_manifest_is_refused_at_once(emr: Path, attack: str) -> None:
    change, said = MANIFESTS[attack]
    edit(emr, change)
    with pytest.raises(FusionKitError, match=said):
        (bundle := Bundle.load(emr, BASE)).check(bundle.tasks)


LATE: dict[str, tuple[Callable[[Json], object], str]] = {
    "other shape": (
        set_at(*TENSOR, "shape", value=[5, 8]),
        r"'w' has shape \[8, 5\], not \[5, 8\]",
    ),
    "terabytes": (set_at(*TENSOR, "shape", value=[10**12]), r"not \[1000000000000\]"),
    "private tensor that is not there": (
        set_at("tasks", "x", "private", value=["nowhere"]),
        "'nowhere' of task 'x' can't be decoded",
    ),
    "private tensor that is compressed": (
        set_at("tasks", "x", "private", value=["w"]),
        "'w' of task 'x' can't be decoded",
    ),
}


PRUNE_SETTINGS: dict[str, tuple[Any, str]] = {
    "density": ("a lot", r"codec\.settings\.density: Expected `float`, got `str`"),
    "scope": ("all", r"codec\.settings\.scope: Invalid enum value 'all'"),
    "merge": (3, r"codec\.settings\.merge: not a codec's or merge's config: 3"),
}


@pytest.mark.parametrize("setting", PRUNE_SETTINGS)
def test_a_setting_of_another_type_is_named_with_its_file(prune: Path, setting: str) -> None:
    value, said = PRUNE_SETTINGS[setting]
    edit(prune, set_at("codec", "settings", setting, value=value))
    with pytest.raises(PluginError, match=r"^/.*manifest\.json: " + said):
        Bundle.load(prune, BASE)


@pytest.mark.parametrize("value", [2.0, float("nan"), 10**400, -1])
def test_a_setting_out_of_range_is_named_with_its_file(prune: Path, value: float) -> None:
    edit(prune, set_at("codec", "settings", "density", value=value))
    with pytest.raises(PluginError, match=r"^/.*manifest\.json: codec.*(density|range|finite)"):
        Bundle.load(prune, BASE)


def test_a_codec_where_a_merge_is_wanted(prune: Path) -> None:
    config = json.loads((prune / "manifest.json").read_text())["codec"]
    edit(prune, set_at("codec", "settings", "merge", value=config))
    with pytest.raises(PluginError, match=r"settings\.merge: expected .*Merge.*got MagnitudePrune"):
        Bundle.load(prune, BASE)


def nested(codec: Json, levels: int) -> Json:
    """DBMS around a codec, and around that, …"""
    for _ in range(levels):
        codec = {"group": codec["group"], "id": "dbms", "settings": {"codec": codec}}
    return codec


def test_codecs_nested_without_end_are_refused_at_once(emr: Path) -> None:
    config = json.loads((emr / "manifest.json").read_text())["codec"]
    edit(emr, set_at("codec", value=nested(config, 7)))
    assert "DBMS" in repr(Bundle.load(emr, BASE).codec)
    for levels in (8, 20, 240):
        edit(emr, set_at("codec", value=nested(config, levels)))
        start = time.perf_counter()
        with pytest.raises(FusionKitError, match=r"manifest\.json: .*nested deeper than"):
            Bundle.load(emr, BASE)
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize("attack", LATE)
def test_a_lying_manifest_is_refused_on_decoding(emr: Path, attack: str) -> None:
    change, said = LATE[attack]
    edit(emr, change)
    with pytest.raises(BundleError, match=said):
        Bundle.load(emr, BASE).state_dict("x")


def test_a_manifest_nested_without_end(emr: Path) -> None:
    (emr / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(BundleError, match=r"manifest\.json: not readable as JSON"):
        Bundle.load(emr, BASE)


def test_a_plugin_that_is_not_installed(emr: Path) -> None:
    config = {
        "group": "fusionkit.codecs",
        "id": "quantum",
        "settings": {},
        "distribution": "quantum-codecs",
        "version": "2.1",
    }
    edit(emr, set_at("codec", value=config))
    said = r"no 'quantum' in fusionkit\.codecs is installed; install it: .* quantum-codecs 2\.1"
    with pytest.raises(PluginError, match=said):
        Bundle.load(emr, BASE)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("group", "name"),
    [("fusionkit.codecs", "evil_module:run"), ("evil_module", "run"), ("console_scripts", "pip")],
)
def test_a_manifest_that_names_an_import_path_imports_nothing(
    prune: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    name: str,
    nested: bool,
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"group": group, "id": name, "settings": {"command": "true"}}
    path = ("codec", "settings", "merge") if nested else ("codec",)
    edit(prune, set_at(*path, value=config))
    with pytest.raises(PluginError, match=f"{re.escape(group)}|no '{name}'"):
        Bundle.load(prune, BASE)
    assert "evil_module" not in sys.modules


class Runs:
    """Unpickles to the making of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_base_that_would_run_code_is_not_unpickled(emr: Path, tmp_path: Path) -> None:
    (tmp_path / "base.pt").write_bytes(pickle.dumps({"w": Runs(tmp_path / "ran")}))
    edit(emr, set_at("base", "source", value=str(tmp_path / "base.pt")))
    with pytest.raises(BundleError, match=r"base\.pt\) can't be opened from here"):
        Bundle.load(emr).state_dict("x")
    assert not (tmp_path / "ran").exists()


# --- payloads ---------------------------------------------------------------------------------


def offsets(start: int, end: int) -> Callable[[Json], object]:
    return lambda header: header["w/mask"].update(data_offsets=[start, end])


HEADERS = {
    "past the end": edit_header(offsets(0, 10**15)),
    "before the start": edit_header(offsets(-400, 5)),
    "backwards": edit_header(offsets(9, 3)),
    "offsets of text": edit_header(lambda h: h["w/mask"].update(data_offsets="ab")),
    "unknown dtype": edit_header(lambda h: h["w/mask"].update(dtype="F4")),
    "huge shape": edit_header(lambda h: h["w/mask"].update(shape=[10**18, 10**18])),
    "no dtype": edit_header(lambda h: h["w/mask"].pop("dtype")),
    "no digests": edit_header(lambda h: h["__metadata__"].pop("digests")),
    "no metadata": edit_header(lambda h: h.pop("__metadata__")),
    "digests cut short": edit_header(lambda h: h["__metadata__"].update(digests="")),
    "not an object": lambda f: replace_payload(f, "task-x.safetensors", b"[1, 2, 3]", b""),
    "not JSON": lambda f: replace_payload(f, "task-x.safetensors", b"\xff\xfe", b""),
    "nested": lambda f: replace_payload(f, "task-x.safetensors", b"[" * 100_000, b""),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_a_malformed_header(emr: Path, attack: str) -> None:
    HEADERS[attack](emr)
    with pytest.raises(BundleError, match=r"emr.*(copy|compress)"):
        Bundle.load(emr, BASE).state_dict("x")


SHARED = "shared.safetensors"
EMR_PARTS = {
    "mask too short": edit_part("w/mask", lambda t: t[:4]),
    "no mask": edit_part("w/mask", lambda _: None),
    "mask of floats": edit_part("w/mask", lambda t: t.float()),
    "no rescaler": edit_part("/rescaler", lambda _: None),
    "rescalers": edit_part("/rescaler", lambda _: torch.ones(3)),
    "vector too short": edit_part("w/elected", lambda t: t[:-1], SHARED),
    "vector too long": edit_part("w/elected", lambda t: torch.cat([t, t]), SHARED),
    "one value": edit_part("w/elected", lambda t: t[:1], SHARED),
    "no vector": edit_part("w/elected", lambda _: None, SHARED),
    "buffer of another shape": edit_part("n/tensor", lambda t: t[:1]),
}
PRUNE_PARTS = {
    "no bytes": edit_part("w/positions", lambda t: t[:0]),
    "positions cut": edit_part("w/positions", lambda t: t[:-1]),
    "positions of floats": edit_part("w/positions", lambda t: t.float()),
    "count of billions": edit_part("w/positions", lambda t: torch.cat([t[:4], t[:9] | 255])),
    "ones": edit_part("w/positions", lambda t: torch.full_like(t, 255)),
    "zeros after": edit_part("w/positions", lambda t: torch.cat([t, t])),
    "too few values": edit_part("w/values", lambda t: t[:-1]),
    "too many values": edit_part("w/values", lambda t: torch.cat([t, t])),
    "no values": edit_part("w/values", lambda _: None),
    "no scale": edit_part("w/values.scale", lambda _: None),
    "merged vector too short": edit_part("w/merged", lambda t: t[:-1], SHARED),
}


@pytest.mark.parametrize("attack", EMR_PARTS)
def test_malformed_parts_of_emr(emr: Path, attack: str) -> None:
    EMR_PARTS[attack](emr)
    with pytest.raises(BundleError, match=r"('[wbn]'|the whole model's) of (task 'x'|all tasks)"):
        Bundle.load(emr, BASE).state_dict("x")


@pytest.mark.parametrize("attack", PRUNE_PARTS)
def test_malformed_parts_of_prune(prune: Path, attack: str) -> None:
    PRUNE_PARTS[attack](prune)
    with pytest.raises(BundleError, match=r"'w' of (task 'x'|all tasks)"):
        Bundle.load(prune, BASE).state_dict("x")


def test_a_link_out_of_the_bundle_is_only_read_as_a_payload(emr: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes((emr / "task-x.safetensors").stat().st_size))
    (emr / "task-x.safetensors").unlink()
    (emr / "task-x.safetensors").symlink_to(outside)
    with pytest.raises(BundleError, match=r"task-x\.safetensors: its header is not what was"):
        Bundle.load(emr, BASE).state_dict("x")
    Bundle.load(emr, BASE).remove("x")
    assert outside.exists()


def test_the_attackers_tools_alone_do_no_harm(emr: Path, prune: Path, tmp_path: Path) -> None:
    """Signing again without a change leaves a bundle that opens: the attacks above are real."""
    for folder in (emr, prune):
        wanted = Bundle.load(folder, BASE).state_dict("x")
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        edit(folder, lambda _: None)
        edit_header(lambda _: None)(folder)
        edit_part("n/tensor", lambda t: t)(folder)
        shared = "w/elected" if folder is emr else "w/merged"
        edit_part(shared, lambda t: t, SHARED)(folder)
        found = Bundle.load(folder, BASE).state_dict("x")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
