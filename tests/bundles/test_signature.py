"""A bundle that is signed: whoever has the key opens what was signed, and nothing else."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import minisign
import pytest
import torch
from checks import contents
from tiny_net import TASKS, Files

import fusionkit
from fusionkit import Bundle, Dense, add_tasks, compress
from fusionkit.bundles.format import MANIFEST
from fusionkit.bundles.sign_bundle import sign_bundle
from fusionkit.bundles.signature import PASSWORD, PUBLIC_KEY, SIGNATURE, UnsignedWarning
from fusionkit.cli.main import main
from fusionkit.errors import BundleError, FusionKitError, SignatureError


class Keys(NamedTuple):
    """Files of a pair of keys."""

    secret: Path
    public: Path

    @property
    def text(self) -> str:
        return self.public.read_text().splitlines()[1]


def keys(folder: Path, name: str = "key", password: str | None = None) -> Keys:
    pair = minisign.KeyPair.generate()
    made = Keys(folder / f"{name}.key", folder / f"{name}.pub")
    made.public.write_bytes(bytes(pair.public_key) + b"\n")
    if password is not None:
        pair.secret_key.encrypt(password, opslimit=1, memlimit=1 << 20)
    made.secret.write_bytes(bytes(pair.secret_key) + b"\n")
    return made


@pytest.fixture
def bundle(files: Files, tmp_path: Path) -> Bundle:
    return compress(files.base, files.finetuned, Dense(), tmp_path / "b", private=["head.*"])


def test_opened_with_the_key_alone_if_it_was_signed(bundle: Bundle, tmp_path: Path) -> None:
    key, other = keys(tmp_path), keys(tmp_path, "other")
    with pytest.raises(SignatureError, match=r"b: is not signed \(it has no manifest.json.minisig"):
        Bundle(bundle.path, key=key.public)
    assert sign_bundle(bundle, key.secret, comment="of mine") == bundle.path / SIGNATURE
    assert "trusted comment: of mine" in (bundle.path / SIGNATURE).read_text()
    for known in (key.public, str(key.public), key.text):
        assert Bundle(bundle.path, key=known).tasks == TASKS
    assert fusionkit.Bundle.from_pretrained(bundle.path, key=key.text).key == key.text
    with pytest.raises(SignatureError, match=r"is no signature of this manifest.json by the key"):
        Bundle(bundle.path, key=other.text)
    with pytest.raises(FusionKitError, match=r"RW12: this key can't be read"):
        Bundle(bundle.path, key="RW12")
    with pytest.raises(FusionKitError, match=r"b: this key can't be read"):
        Bundle(bundle.path, key=bundle.path)


def test_nothing_of_a_bundle_is_used_before_it_is_verified(bundle: Bundle, tmp_path: Path) -> None:
    key = keys(tmp_path)
    sign_bundle(bundle, key.secret)
    path = bundle.path / MANIFEST
    for text in ("{", path.read_text() + " ", path.read_text().replace('"dense"', '"other"')):
        path.write_text(text)
        with pytest.raises(SignatureError, match="was changed after it was signed"):
            Bundle(bundle.path, key=key.text)


@pytest.mark.parametrize("what", ["another task's", "a bit of a head", "a bit of the header"])
def test_files_are_bound_by_what_is_signed(bundle: Bundle, tmp_path: Path, what: str) -> None:
    key = keys(tmp_path)
    sign_bundle(bundle, key.secret)
    file = bundle.path / "task-bee.safetensors"
    if what == "another task's":
        shutil.copy(bundle.path / "task-cat.safetensors", file)
    else:
        raw = bytearray(file.read_bytes())
        head = bundle.private_tensor("bee", "head.weight").numpy().tobytes()
        raw[raw.index(head) if "head" in what and "er" not in what else 12] ^= 1
        file.write_bytes(raw)
    opened = Bundle(bundle.path, key=key.text)
    with pytest.raises(BundleError, match=r"SHA-256 differs|truncated or replaced"):
        dict(opened.private_tensors("bee"))


def test_a_change_takes_the_signature_away(bundle: Bundle, files: Files, tmp_path: Path) -> None:
    key = keys(tmp_path)
    sign_bundle(bundle, key.secret)
    with pytest.warns(UnsignedWarning, match=r"b: was signed, and says something else now; .*sign"):
        bundle.remove("cat")
    assert SIGNATURE not in contents(bundle.path)
    sign_bundle(bundle, key.secret)
    with pytest.warns(UnsignedWarning):
        add_tasks(bundle, {"cat": files.finetuned["cat"]})
    with pytest.raises(SignatureError, match="is not signed"):
        Bundle(bundle.path, key=key.text)


def test_a_copy_is_signed_if_it_is_of_all(bundle: Bundle, tmp_path: Path) -> None:
    key = keys(tmp_path)
    sign_bundle(bundle, key.secret)
    bundle.save(tmp_path / "all")
    bundle.save(tmp_path / "named", tasks=["cat", "ant", "bee"])
    assert contents(tmp_path / "all") == contents(tmp_path / "named") == contents(bundle.path)
    bundle.save(tmp_path / "some", tasks=["cat"])
    assert SIGNATURE not in contents(tmp_path / "some")


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_minisign_itself(bundle: Bundle, tmp_path: Path) -> None:
    """What it signs is verified here, and it verifies what is signed here; by its keys."""

    def run(*words: object, told: str = "") -> None:
        words = ("minisign", *words)
        subprocess.run(list(map(str, words)), check=True, input=told, text=True, timeout=60)

    key = Keys(tmp_path / "k.key", tmp_path / "k.pub")
    run("-G", "-W", "-p", key.public, "-s", key.secret)
    file = bundle.path / MANIFEST
    run("-S", "-s", key.secret, "-m", file)
    assert Bundle(bundle.path, key=key.public).tasks == TASKS
    run("-S", "-l", "-s", key.secret, "-m", file)  # the older kind
    assert Bundle(bundle.path, key=key.text).tasks == TASKS
    sign_bundle(bundle, key.secret)
    run("-V", "-p", key.public, "-m", file)
    own = keys(tmp_path, "own")
    sign_bundle(bundle, own.secret)
    run("-V", "-P", own.text, "-m", file)


def test_the_command(
    bundle: Bundle,
    files: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, path = keys(tmp_path, password="secret"), str(bundle.path)
    monkeypatch.setenv(PUBLIC_KEY, "")

    def run(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(list(words))
        return capsys.readouterr().err

    assert f"nobody is here to be asked; set {PASSWORD}" in run(
        "sign", path, "--key", str(key.secret)
    )
    monkeypatch.setenv(PASSWORD, "wrong")
    assert "can't be signed with (wrong password" in run("sign", path, "--key", str(key.secret))
    assert "is not signed" in run("inspect", path, "--key", key.text)
    monkeypatch.setenv(PASSWORD, "secret")
    main(["sign", path, "--key", str(key.secret)])
    for line in (["inspect", path, "--key", key.text], ["inspect", f"--key={key.public}", path]):
        main(line)
    assert "written: " in capsys.readouterr().out
    monkeypatch.setenv(PUBLIC_KEY, keys(tmp_path, "other").text)
    for line in (
        ["inspect", path],
        ["remove", path, "cat"],
        ["export", path, "--task", "ant", "--out", str(tmp_path / "a.pt")],
    ):
        assert "is no signature of this manifest.json by the key RW" in run(*line)
    # What this process makes itself needs no signature.
    new = compress(files.base, files.finetuned, Dense(), tmp_path / "new", private=["head.*"])
    assert new.key is None
    with pytest.raises(SignatureError):
        Bundle(tmp_path / "new")


def test_secret_keys_that_can_not_be_used(bundle: Bundle, tmp_path: Path) -> None:
    key = keys(tmp_path)
    cases: list[tuple[Any, Callable[[], object]]] = [
        ("this key can't be read", lambda: sign_bundle(bundle, tmp_path / "none.key")),
        ("can't be signed with", lambda: sign_bundle(bundle, key.public)),
    ]
    for match, call in cases:
        with pytest.raises(FusionKitError, match=match):
            call()
    (bundle.path / "task-bee.safetensors").unlink()
    with pytest.raises(BundleError, match="missing from the bundle"):
        sign_bundle(bundle, key.secret)
    assert torch.is_tensor(bundle.private_tensor("ant", "head.weight"))
