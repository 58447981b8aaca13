"""Where an MQTT broker is, as whom we come to it, and how we know that it is the right one."""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..models.errors import InputError, MissingExtraError

PASSWORD_VARIABLE = "EDGESIGHT_MQTT_PASSWORD"
PORT, PORT_TLS = 1883, 8883
TEXT_MAX = 1000
"""Characters of a password, user or prefix."""


@dataclass(frozen=True)
class Broker:
    """Where a broker is, and as whom we come; without TLS all of it can be read on the way."""

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None = field(repr=False)
    prefix: str

    @classmethod
    def parse(cls, url: str, default_prefix: str, password_file: Path | None = None) -> Broker:
        """Returns what ``mqtt://user@host:1883/prefix`` (``mqtts://``: with TLS) says.

        Args:
            url: With everything but the host left out at will.
            default_prefix: Of the topics.
            password_file: Holds the password; else the address does, or the environment's
                ``EDGESIGHT_MQTT_PASSWORD``.

        Raises:
            InputError: It is no such address, or there is no password in the file.
        """
        # The address is never shown: what is wrong with it may be its password.
        hint = "write mqtt://USER@HOST:PORT/PREFIX or mqtts://..."
        try:
            parts = urlsplit(url.strip())
            port, host = parts.port, parts.hostname
        except ValueError:
            message = f"MQTT: expected a host and a port 1 to 65535, found neither; {hint}"
            raise InputError(message) from None
        if parts.scheme not in ("mqtt", "mqtts") or not host or port == 0:
            message = f"MQTT: expected mqtt:// or mqtts://, a host and perhaps a port; {hint}"
            raise InputError(message)
        if parts.query or parts.fragment or "@" in parts.path:
            message = "MQTT: expected no ? # @ or / in names; write %3F %23 %40 %2F"
            raise InputError(message)
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        if password_file is not None:
            password = _read_password(password_file)
        elif password is None:
            password = os.environ.get(PASSWORD_VARIABLE) or None
        if password is not None and user is None:
            message = "MQTT: expected a user with the password, found none; " + hint
            raise InputError(message)
        for text in (user or "", password or ""):
            if len(text) > TEXT_MAX or not _is_text(text):
                message = f"MQTT: expected user and password of at most {TEXT_MAX} characters"
                raise InputError(message)
        prefix = checked_topic(unquote(parts.path).strip("/") or default_prefix, "prefix")
        tls = parts.scheme == "mqtts"
        return cls(host, port or (PORT_TLS if tls else PORT), tls, user, password, prefix)


def checked_topic(text: str, what: str) -> str:
    """Returns the beginning of topics, without slashes around it.

    Args:
        text: What the user wrote.
        what: What it is, for people.

    Raises:
        InputError: It cannot stand in a topic.
    """
    text = text.strip("/")
    wrong = re.search(r"[+#\x00-\x1f\x7f]", text) or text.startswith("$") or "//" in text
    if wrong or not _is_text(text) or not 0 < len(text) <= TEXT_MAX:
        message = (
            f"MQTT: expected a {what} as a/b without + # and $, found {text[:80]!r}; choose another"
        )
        raise InputError(message)
    return text


def _is_text(text: str) -> bool:
    """Returns whether it can be sent: a command line may hold bytes that are no text."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def _read_password(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(TEXT_MAX + 2).rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        message = f"{file}: expected a file that holds a password, found none ({reason})"
        raise InputError(message) from error
    if not text or "\n" in text:
        message = f"{file}: expected one line, the password; found none or more"
        raise InputError(message)
    return text


def tls_context(broker: Broker, ca_file: Path | None) -> ssl.SSLContext | None:
    """Returns what checks the broker's certificate and name; None without TLS.

    Args:
        broker: Where it is.
        ca_file: Certificates (PEM) that the broker's may be signed with; the system's by default.

    Raises:
        InputError: The file cannot be read, or there would be nothing to check.
    """
    if not broker.tls:
        if ca_file is None:
            return None
        message = f"MQTT: expected mqtts:// with the certificates {ca_file}, found mqtt://"
        raise InputError(message)
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else os.fspath(ca_file))
    except (OSError, ssl.SSLError) as error:
        message = f"{ca_file}: expected certificates (PEM), found none ({error.strerror or error})"
        raise InputError(message) from error


def check_paho() -> None:
    """Checks that the extra ``mqtt`` is installed.

    Raises:
        MissingExtraError: It is not, or too old (Debian 12 has 1.6).
    """
    try:
        import paho.mqtt.client as paho
    except ImportError:
        paho = None  # type: ignore[assignment]
    if not hasattr(paho, "CallbackAPIVersion"):
        found = "none" if paho is None else "an older one"
        message = f"expected the package paho-mqtt >= 2, found {found}; "
        raise MissingExtraError(message + "pip install '.[mqtt]'")
