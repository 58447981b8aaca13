"""The run over MQTT: its state, its events, and whether it is there at all.

Topics under the prefix: ``availability`` (``online``, ``offline``; the broker says the latter if we
vanish), ``state`` (JSON), ``events`` and ``zones/NAME/events`` (JSON, as they come). Nothing that
comes in changes anything: we only listen for Home Assistant's start, and for a false ``offline``.

One thread does it all, so that nobody else ever waits for a broker, and what it holds has an end.
"""

from __future__ import annotations

import hashlib
import platform
import socket
import ssl
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .events import Event, Listener
from .home_assistant import LATE_S, Message, Topics, problem_of, slug, state_of, to_json
from .live import LiveView
from .mqtt_broker import Broker, check_paho, checked_topic, tls_context

if TYPE_CHECKING:  # an extra
    from paho.mqtt.client import Client

EVENTS_KEPT = 200
"""Events that wait for an absent broker; the oldest go first."""
UNACKNOWLEDGED_MAX = 20
NAMES_MAX = 200
"""Classes that Home Assistant is told of: some models know thousands."""
TICK_S = 0.1
GAP_S = 0.2
"""Between two states, however often the counts change."""
ANSWER_S = 10.0
"""So long the broker may take to greet."""
KEEPALIVE_S = 15
RETRY_MIN_S, RETRY_MAX_S = 1.0, 30.0
STEADY_S = 10.0
"""After so long a connection counts as a good one, and the next wait is short again."""
FAREWELL_S = 1.0
JOIN_S = 2.0


class MqttLink:
    """Tells a broker how the run goes, for as long as it goes; a broker that is away is waited for.

    Args:
        url: Of the broker, as ``mqtt://user@host:1883/prefix``; see ``Broker.parse``.
        live: What is told.
        name: Of this camera, for people and in the default prefix ``edgesight/NAME``.
        password_file: Holds the password.
        ca_file: Certificates (PEM) that the broker's may be signed with; the system's by default.
        discovery: Prefix that Home Assistant listens to; None or empty: it is told nothing.
        interval_s: Seconds between two states while nothing happens.
        keepalive_s: The broker calls us gone after 1.5 times this.

    Raises:
        InputError: The address or a file is wrong, or the extra is not installed.
    """

    def __init__(
        self,
        url: str,
        live: LiveView,
        *,
        name: str = "edgesight",
        password_file: Path | None = None,
        ca_file: Path | None = None,
        discovery: str | None = "homeassistant",
        interval_s: float = 5.0,
        keepalive_s: int = KEEPALIVE_S,
    ) -> None:
        """Checks everything that can be checked without the broker."""
        self.broker = Broker.parse(url, f"edgesight/{slug(name)}", password_file)
        self._tls = tls_context(self.broker, ca_file)
        prefix = checked_topic(discovery, "discovery prefix") if discovery else ""
        self.topics = Topics(self.broker.prefix, name, prefix)
        check_paho()
        self.state = "retrying: connecting"
        self._live, self._interval_s, self._keepalive_s = live, interval_s, keepalive_s
        self._client_id = _client_id(self.broker.prefix)
        self._listener: Listener | None = None
        self._waiting: deque[tuple[Event, float]] = deque(maxlen=EVENTS_KEPT)
        self._missed = 0
        self._names: dict[tuple[str, str], list[Message]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgesight-mqtt", daemon=True)

    @property
    def missed(self) -> int:
        """Events that were thrown away because the broker was away for too long."""
        return self._missed + (self._listener.missed if self._listener else 0)

    def start(self) -> None:
        """Begins to connect, for ever if need be; never waits."""
        self._listener = self._live.events.listen()
        self._thread.start()

    def stop(self) -> None:
        """Says ``offline`` and goes; waits for two seconds at most. May be called twice."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
        if self._listener is not None:
            self._listener.close()
        self.state = "stopped"

    def _run(self) -> None:
        wait_s = RETRY_MIN_S
        while not self._stopping.is_set():
            session = _Session(self.broker, self._tls, self._client_id, self.topics)
            try:
                self._talk(session)
            except Exception as error:  # a defect of ours, too, must not end it for ever
                if not self._stopping.is_set():
                    self.state = f"retrying: {_reason(error)}"
            finally:
                session.close()
            unsent = [item for item in session.unacknowledged.values() if item is not None]
            self._waiting = deque([*unsent, *self._waiting], maxlen=EVENTS_KEPT)
            if session.age_s() > STEADY_S:
                wait_s = RETRY_MIN_S
            until = time.monotonic() + wait_s
            while (left := until - time.monotonic()) > 0 and not self._stopping.wait(min(1, left)):
                self._hear()
            wait_s = min(2 * wait_s, RETRY_MAX_S)

    def _talk(self, session: _Session) -> None:
        """Connects and tells everything until the connection or the run ends."""
        if not session.connect(self._keepalive_s, self._stopping):
            return
        self.state = "connected"
        session.publish(self.topics.availability, "online", qos=1, retain=True)
        session.online_s = time.monotonic()
        session.subscribe()
        self._greet(session)
        while not self._stopping.is_set():
            self._tell(session)
            session.turn(TICK_S)
        self._tell(session, last=True)
        session.publish(self.topics.availability, "offline", qos=1, retain=True)
        session.leave(FAREWELL_S)

    def _greet(self, session: _Session) -> None:
        """Introduces everything to Home Assistant, once more if need be."""
        session.greet = False
        session.greeted_s = time.monotonic()
        session.greetings.clear()
        if self.topics.discovery:
            session.greetings += self.topics.device()
            for messages in self._names.values():
                session.greetings += messages

    def _tell(self, session: _Session, last: bool = False) -> None:
        now = time.monotonic()
        self._hear()
        if session.offline and now >= session.online_s + 1:  # the will of an earlier us, come late
            session.publish(self.topics.availability, "online", qos=1, retain=True)
            session.offline, session.online_s = False, now
        if session.greet and now >= session.greeted_s + 1:
            self._greet(session)
            session.state_s = 0.0
        figures = self._live.figures()
        if self.topics.discovery:
            self._meet(session, "class", figures.get("detections", {}))
            self._meet(session, "zone", figures.get("zones", {}))
        while session.greetings and session.free:
            topic, payload = session.greetings.popleft()
            session.publish(topic, payload, qos=1, retain=True)
        news = (figures.get("detections"), figures.get("zones"), problem_of(figures))
        due_s = session.state_s + (GAP_S if news != session.told else self._interval_s)
        if figures and session.writable and (last or now >= due_s):
            payload = to_json(state_of(figures, self.missed))
            session.publish(self.topics.state, payload, qos=0, retain=True)
            session.told, session.state_s = news, now
        while self._waiting and session.free:
            event, heard_s = self._waiting.popleft()
            try:
                topic, payload = self.topics.event(event, now - heard_s > LATE_S)
            except (TypeError, ValueError):  # no JSON; the next one may be
                self._missed += 1
                continue
            session.publish(topic, payload, qos=1, item=(event, heard_s))

    def _meet(self, session: _Session, what: str, names: dict[str, Any]) -> None:
        """Introduces what is seen for the first time."""
        for name in names:
            if (what, name) in self._names:
                continue
            if what == "class" and len(self._names) >= NAMES_MAX:
                continue
            messages = self.topics.of_class(name) if what == "class" else self.topics.of_zone(name)
            self._names[what, name] = messages
            session.greetings += messages

    def _hear(self) -> None:
        """Takes the events over, so that we know how long they wait."""
        assert self._listener is not None
        now = time.monotonic()
        while (event := self._listener.get(0)) is not None:
            self._missed += len(self._waiting) == EVENTS_KEPT
            self._waiting.append((event, now))


class _Lost(Exception):
    """The connection ended, or never began; says why."""


class _Session:
    """One connection, used by one thread; a client of its own, so that nothing is left behind.

    Attributes:
        unacknowledged: Messages on their way, by number; events with what is needed to tell again.
        greetings: Discovery that is still to be sent.
        greet: Home Assistant has started and wants all of it again.
        offline: Somebody says that we are gone.
    """

    def __init__(
        self, broker: Broker, tls: ssl.SSLContext | None, client_id: str, topics: Topics
    ) -> None:
        self.unacknowledged: dict[int, tuple[Event, float] | None] = {}
        self.greetings: deque[Message] = deque()
        self.greet = self.offline = False
        self.greeted_s = self.online_s = self.state_s = 0.0
        self.told: Any = None
        self._broker, self._topics = broker, topics
        self._connected_s: float | None = None
        self._why: str | None = None
        self._client = self._new_client(tls, client_id)

    def _new_client(self, tls: ssl.SSLContext | None, client_id: str) -> Client:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client = Client(CallbackAPIVersion.VERSION2, client_id, reconnect_on_failure=False)
        if self._broker.user is not None:
            client.username_pw_set(self._broker.user, self._broker.password)
        if tls is not None:
            client.tls_set_context(tls)
        client.will_set(self._topics.availability, "offline", qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    def connect(self, keepalive_s: int, stopping: threading.Event) -> bool:
        """Connects; returns False if it is to stop before that."""
        self._client.connect(self._broker.host, self._broker.port, keepalive_s)
        until = time.monotonic() + ANSWER_S
        while self._connected_s is None:
            if stopping.is_set():
                return False
            if time.monotonic() > until:
                message = "the broker does not answer"
                raise _Lost(message)
            self.turn(TICK_S)
        return True

    def subscribe(self) -> None:
        """Asks for the little that we listen to."""
        self._client.subscribe(self._topics.availability, 1)
        if self._topics.discovery:  # the status topic has its own setting in Home Assistant
            for prefix in {self._topics.discovery, "homeassistant"}:
                self._client.subscribe(f"{prefix}/status", 0)

    def turn(self, wait_s: float) -> None:
        """Reads and writes what there is; raises if the connection is gone."""
        code = self._client.loop(wait_s)
        if self._why is not None or code != 0:
            raise _Lost(self._why or "connection lost")

    @property
    def writable(self) -> bool:
        """Whether nothing waits to be written."""
        return not self._client.want_write()

    @property
    def free(self) -> bool:
        """Whether one more message that the broker must acknowledge may be sent."""
        return self.writable and len(self.unacknowledged) < UNACKNOWLEDGED_MAX

    def publish(
        self,
        topic: str,
        payload: str,
        *,
        qos: int,
        retain: bool = False,
        item: tuple[Event, float] | None = None,
    ) -> None:
        """Sends a message, or has it sent later; never waits."""
        number = self._client.publish(topic, payload, qos, retain).mid
        if qos:
            self.unacknowledged[number] = item

    def leave(self, wait_s: float) -> None:
        """Waits until everything is acknowledged, and says goodbye."""
        until = time.monotonic() + wait_s
        while self.unacknowledged and time.monotonic() < until:
            self.turn(TICK_S)
        self._client.disconnect()
        while not self.writable and time.monotonic() < until:
            self.turn(TICK_S)

    def close(self) -> None:
        """Closes the connection, whatever state it is in."""
        if (open_socket := self._client.socket()) is not None:
            open_socket.close()
        del self._client  # it knows us: its other sockets would stay until the garbage goes

    def age_s(self) -> float:
        """Returns for how long it was connected."""
        return 0.0 if self._connected_s is None else time.monotonic() - self._connected_s

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if not reason.is_failure:
            self._connected_s = time.monotonic()
        elif str(reason) in ("Bad user name or password", "Not authorized"):
            self._why = f"the broker refuses user or password ({reason})"
        else:
            self._why = f"the broker refuses us ({reason})"

    def _on_disconnect(
        self, client: Any, data: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        if str(reason) == "Keep alive timeout":
            self._why = self._why or "the broker does not answer"
        hint = " (is its name used twice?)" if 0 < self.age_s() < STEADY_S else ""
        self._why = self._why or f"the broker closed the connection{hint}"

    def _on_publish(self, client: Any, data: Any, mid: int, reason: Any, properties: Any) -> None:
        self.unacknowledged.pop(mid, None)

    def _on_message(self, client: Any, data: Any, message: Any) -> None:
        if message.topic == self._topics.availability:
            self.offline = message.payload == b"offline"
        elif message.payload == b"online" and not message.retain:
            self.greet = True


def _client_id(prefix: str) -> str:
    """Returns the same for every run here: the broker ends what is left of an earlier one."""
    here = f"{prefix} {platform.node()} {uuid.getnode()}"
    return f"edgesight-{hashlib.sha256(here.encode()).hexdigest()[:12]}"


def _reason(error: Exception) -> str:
    """Returns in a few words why there is no connection."""
    if isinstance(error, _Lost):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is refused: {error.verify_message}"
    if isinstance(error, socket.gaierror):
        return "the broker's host name is not known"
    if isinstance(error, TimeoutError):
        return "the broker does not answer"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
