"""Signed bundles: only those of the trusted key are opened, and the private key stays private."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.deploy import bundle_sign
from edgesight.deploy.bundle_open import open_bundle
from edgesight.deploy.manifest import SIGNATURE
from edgesight.models.errors import InputError, MissingExtraError, OutputError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_kit.py"))))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    bundle_sign.make_keys(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def test_signed_bundle_opens_with_its_key_and_with_no_other(
    tmp_path: Path,
    key: Path,
    tiny_onnx: Any,
    tiny_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_onnx(spec=tiny_spec)
    out = tmp_path / "it.esbundle"
    assert kit.run([model, "-o", out, "--sign", key], monkeypatch) == 0
    assert "there, not checked (give --trust KEY.pub)" in capsys.readouterr().out
    assert kit.run(["--show", out, "--trust", public(key), "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == "trusted"
    bundle = open_bundle(out, trusted_key=public(key))
    assert bundle.trusted
    folder = bundle.extract(tmp_path / "out")
    bundle_sign.verify(
        (folder / "manifest.json").read_bytes(), (folder / SIGNATURE).read_bytes(), public(key)
    )
    assert not open_bundle(out).trusted
    other = bundle_sign.make_keys(tmp_path / "other.pem")
    assert kit.run(["--show", out, "--trust", other], monkeypatch) == 2
    said = capsys.readouterr().err
    assert "found another's or a changed bundle" in said
    assert said.count("\n") == 1


def test_unsigned_or_changed_bundle_is_refused_where_a_key_is_trusted(
    tmp_path: Path, key: Path, tiny_onnx: Any, tiny_spec: Any
) -> None:
    path = kit.build(tmp_path, tiny_onnx(spec=tiny_spec))
    with pytest.raises(InputError, match=r"key\.pem\.pub's owner, found none; make the bundle"):
        open_bundle(path, trusted_key=public(key))
    path = kit.build(tmp_path, tiny_onnx(spec=tiny_spec), key=key)
    parts = kit.parts_of(path)
    signature = parts.files.pop(SIGNATURE)
    assert parts.pack(signature=signature) == path.read_bytes()
    changes = {
        "another name": lambda: parts.manifest.update(name="evil"),
        "a file more": lambda: (parts.files.update({"reports/x.json": b"{}"}), parts.describe()),
    }
    for change in changes.values():
        parts = kit.parts_of(path)
        del parts.files[SIGNATURE]
        change()
        path.with_name("bad.esbundle").write_bytes(parts.pack(signature=signature))
        open_bundle(path.with_name("bad.esbundle")).check()  # but for the key, it is a good one
        with pytest.raises(InputError, match="found another's or a changed bundle"):
            open_bundle(path.with_name("bad.esbundle"), trusted_key=public(key))
    path.write_bytes(parts.pack(signature=signature[:-1]))
    with pytest.raises(InputError, match=r"manifest\.sig: expected 64 bytes, found 63"):
        open_bundle(path)


def test_same_key_and_content_give_the_same_bytes(
    tmp_path: Path, key: Path, tiny_onnx: Any, tiny_spec: Any
) -> None:
    first = kit.build(tmp_path, tiny_onnx(spec=tiny_spec), key=key).read_bytes()
    assert kit.build(tmp_path, tiny_onnx(spec=tiny_spec), key=key).read_bytes() == first


def test_signature_is_openssl_s_too(tmp_path: Path, key: Path) -> None:
    """What is signed is documented: another program can check it."""
    openssl = shutil.which("openssl")
    assert openssl is not None
    (tmp_path / "text").write_bytes(bundle_sign.PURPOSE + b"{}\n")
    (tmp_path / "sig").write_bytes(bundle_sign.sign(b"{}\n", key))
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(public(key)), "-rawin"]
    command += ["-in", str(tmp_path / "text"), "-sigfile", str(tmp_path / "sig")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Signature Verified" in done.stdout) == (0, True), done.stderr


def test_new_key_is_for_its_owner_alone_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "keys" / "key.pem"
    before = os.umask(0)
    try:
        assert kit.run(["--new-key", key], monkeypatch) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "PRIVATE" in key.read_text()
    assert "PRIVATE" not in public(key).read_text()
    body = key.read_text().splitlines()[1]
    said = capsys.readouterr()
    assert body not in said.out + said.err
    old = key.read_bytes()
    assert kit.run(["--new-key", key], monkeypatch) == 2
    assert "expected a free name" in capsys.readouterr().err
    key.unlink()
    with pytest.raises(OutputError, match=r"key\.pem\.pub: expected a free name"):
        bundle_sign.make_keys(key)
    assert not key.exists()
    public(key).unlink()
    bundle_sign.make_keys(key)
    assert key.read_bytes() != old


@pytest.mark.parametrize("kind", ["absent", "no key", "public", "cut", "rsa", "password"])
def test_what_is_no_private_key_is_one_line_without_the_key(
    kind: str, tmp_path: Path, key: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    path = tmp_path / "bad.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    if kind == "no key":
        path.write_bytes(b"hello")
    elif kind == "public":
        path.write_bytes(public(key).read_bytes())
    elif kind == "cut":
        path.write_bytes(key.read_bytes()[:70])
    elif kind == "rsa":
        made = rsa.generate_private_key(65537, 2048)
        path.write_bytes(made.private_bytes(encoding, form, serialization.NoEncryption()))
    elif kind == "password":
        secret = serialization.BestAvailableEncryption(b"secret")
        own = ed25519.Ed25519PrivateKey.generate()
        path.write_bytes(own.private_bytes(encoding, form, secret))
    with pytest.raises(InputError, match=r"bad\.pem: expected a (private ed25519 )?key") as caught:
        bundle_sign.sign(b"{}", path)
    lines = path.read_text().splitlines() if path.exists() else []
    assert "\n" not in str(caught.value)
    assert not [line for line in lines if line in str(caught.value)]


def test_private_key_is_no_trusted_key(tmp_path: Path, key: Path) -> None:
    signature = bundle_sign.sign(b"{}", key)
    with pytest.raises(InputError, match="expected a public ed25519 key") as caught:
        bundle_sign.verify(b"{}", signature, key)
    assert key.read_text().splitlines()[1] not in str(caught.value)


def test_without_the_package_the_extra_is_named(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(MissingExtraError, match=r"package cryptography.*\[sign\]"):
        bundle_sign.sign(b"{}", key)
