"""Signatures of bundles: ed25519 over the manifest, which names every file by its SHA-256.

What is signed is ``PURPOSE`` followed by the bytes of ``manifest.json``, so that a signature made
for something else is none here. Keys are PEM files as OpenSSL makes them: the private one PKCS #8
(``openssl genpkey -algorithm ed25519``), the public one SubjectPublicKeyInfo.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ..models.errors import InputError, MissingExtraError, OutputError
from ..models.files import write_bytes

PURPOSE = b"edgesight bundle, version 1\n"
SIGNATURE_BYTES = 64
PUBLIC_SUFFIX = ".pub"
KEY_FILE_MAX = 16 << 10


def make_keys(path: Path) -> Path:
    """Writes a new private key, for its owner's eyes only, and its public key beside it.

    Args:
        path: Of the private key; never replaced.

    Returns:
        The public key's path: the same with ``.pub`` after it.

    Raises:
        OutputError: A file is there already, or cannot be written.
        MissingExtraError: The package ``cryptography`` is not installed.
    """
    serialization, ed25519 = _cryptography()
    public_path = path.with_name(path.name + PUBLIC_SUFFIX)
    for taken in (path, public_path):
        if os.path.lexists(taken):
            message = f"{taken}: expected a free name, found a file; choose another name"
            raise OutputError(message)
    key = ed25519.Ed25519PrivateKey.generate()
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password)
    public = key.public_key().public_bytes(
        encoding, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # From its first byte on nobody else can read it; write_bytes would open it to the umask.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        made = True
        with os.fdopen(handle, "wb") as file:
            file.write(private)
        write_bytes(public_path, public)
    except (OSError, OutputError) as error:
        if made:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, OutputError):
            raise
        message = f"cannot write {path}: {error.strerror or error}; choose another place"
        raise OutputError(message) from error
    return public_path


def sign(manifest: bytes, key_path: Path) -> bytes:
    """Returns the signature of a manifest; the same for the same key and bytes.

    Raises:
        InputError: The file holds no private ed25519 key that opens without a password.
        MissingExtraError: The package ``cryptography`` is not installed.
    """
    serialization, ed25519 = _cryptography()
    data = _read_key(key_path)
    key = None
    # The error of a key that cannot be read may quote it: it is neither shown nor chained.
    with contextlib.suppress(Exception):
        key = serialization.load_pem_private_key(data, None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        message = (
            f"{key_path}: expected a private ed25519 key without a password (PEM), found none; "
            "make one with edgesight bundle --new-key KEY.pem"
        )
        raise InputError(message)
    return bytes(key.sign(PURPOSE + manifest))


def verify(manifest: bytes, signature: bytes | None, public_path: Path) -> None:
    """Refuses a manifest that the owner of a key has not signed.

    Args:
        manifest: The bytes of ``manifest.json``.
        signature: As it came with them; None without one.
        public_path: The public key that is trusted.

    Raises:
        InputError: There is no signature, or not this key's; or the file holds no public key.
        MissingExtraError: The package ``cryptography`` is not installed.
    """
    serialization, ed25519 = _cryptography()
    data = _read_key(public_path)
    key = None
    with contextlib.suppress(Exception):  # as above: it may be the private key, given by mistake
        key = serialization.load_pem_public_key(data)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        message = (
            f"{public_path}: expected a public ed25519 key (PEM), found none; "
            f"name the {PUBLIC_SUFFIX} file that --new-key wrote"
        )
        raise InputError(message)
    if signature is None:
        message = (
            f"bundle: expected a signature of {public_path}'s owner, found none; "
            "make the bundle with --sign KEY.pem"
        )
        raise InputError(message)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, PURPOSE + manifest)
    except InvalidSignature:
        message = (
            f"bundle: expected a signature of {public_path}'s owner, found another's or a changed "
            "bundle; get it from its maker again, or trust the other key"
        )
        raise InputError(message) from None


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_FILE_MAX)
    except OSError as error:
        message = f"{path}: expected a key file, found: {error.strerror or error}; check the path"
        raise InputError(message) from error


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError.of(package="cryptography", extra="sign") from error
    return serialization, ed25519
