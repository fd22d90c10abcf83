"""Apps at a broker that lets nobody in unknown: they work, or say what to set."""

from __future__ import annotations

import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion

from iot_lab.processes import LOOPBACK, CouchDB, Database, Pipeline, wait_for
from iot_lab.secure_broker import Authority, SecureBroker, pipeline_acls, write_secret
from iot_pipeline.access import find_problem
from iot_pipeline.errors import Exit, SinkUnavailable
from iot_pipeline.settings import ProduceSettings, StoreSettings, load
from iot_pipeline.stores import Store, open_store


@pytest.fixture
def ungranted(folder: Path, secure_broker: SecureBroker, database: CouchDB) -> Iterator[Pipeline]:
    """Topics that no app may use."""
    prefix = f"ungranted-{secrets.token_hex(3)}-"
    with Pipeline(folder / prefix.rstrip("-"), secure_broker, database, prefix) as pipeline:
        yield pipeline


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path / "stranger", "another authority")


def flags_of(environment: dict[str, str]) -> list[str]:
    return [
        word
        for name, value in environment.items()
        for word in (f"--{name.removeprefix('IOT_').lower().replace('_', '-')}", value)
    ]


def test_images_flow_between_apps_that_log_in(
    secure_pipeline: Pipeline, assert_clean: Callable[[Pipeline, int], None]
) -> None:
    workers = [secure_pipeline.store().start(), secure_pipeline.infer().start()]
    producer = secure_pipeline.produce("--count", "20", "--interval", "0.02").start()
    assert producer.wait(60) == 0, producer.output()
    for worker in workers:
        worker.wait_ready()
    assert_clean(secure_pipeline, 20)
    assert isinstance(secure_pipeline.broker, SecureBroker)
    for app in (*workers, producer):
        for password in secure_pipeline.broker.passwords.values():
            assert password not in app.output()


@pytest.mark.parametrize("way", ["PLAIN", "certificate"])
def test_other_ways_to_log_in(
    secure_pipeline: Pipeline, secure_broker: SecureBroker, way: str
) -> None:
    chosen = secure_broker.environment("iot-producer", "PLAIN")
    if way == "certificate":
        chosen = secure_broker.mutual_environment("iot-producer")
        chosen |= {"IOT_SASL_USERNAME": "", "IOT_SASL_PASSWORD_FILE": ""}
    app = secure_pipeline.produce("--count", "3", "--interval", "0", *flags_of(chosen)).start()
    assert app.wait(60) == 0, app.output()
    assert secure_pipeline.produced() == 3


REFUSALS: dict[str, tuple[dict[str, str], str]] = {
    "wrong password": (
        {"IOT_SASL_PASSWORD_FILE": "{wrong}"},
        "refuses user 'iot-producer': check IOT_SASL_USERNAME and IOT_SASL_PASSWORD_FILE",
    ),
    "wrong password, PLAIN": (
        {"IOT_SASL_PASSWORD_FILE": "{wrong}", "IOT_SASL_MECHANISM": "PLAIN"},
        "refuses user 'iot-producer': check IOT_SASL_USERNAME and IOT_SASL_PASSWORD_FILE",
    ),
    "unknown user": ({"IOT_SASL_USERNAME": "nobody"}, "refuses user 'nobody'"),
    "empty password": ({"IOT_SASL_PASSWORD_FILE": "{empty}"}, "IOT_SASL_PASSWORD_FILE: .*empty"),
    "another authority": ({"IOT_TLS_CA_FILE": "{stranger}"}, "certificate is refused .*_CA_FILE"),
    "another name": ({"IOT_BOOTSTRAP_SERVERS": "127.1:{port}"}, "is not for 127.1: .*_SERVERS"),
    "in the clear": (
        {"IOT_SECURITY_PROTOCOL": "PLAINTEXT"},
        r"wants TLS on this port \(IOT_SECURITY_PROTOCOL\)",
    ),
    "as nobody": (
        {"IOT_SECURITY_PROTOCOL": "SSL"},
        "wants a user .*IOT_SECURITY_PROTOCOL=SASL_SSL",
    ),
    "user at the port for certificates": (
        {"IOT_BOOTSTRAP_SERVERS": "{mutual}"},
        "refuses our certificate, or that there is none .*IOT_TLS_CERTIFICATE_FILE",
    ),
    "no certificate": (
        {"IOT_SECURITY_PROTOCOL": "SSL", "IOT_BOOTSTRAP_SERVERS": "{mutual}"},
        "refuses our certificate, or that there is none .*IOT_TLS_CERTIFICATE_FILE",
    ),
    "a certificate of another authority": (
        {
            "IOT_SECURITY_PROTOCOL": "SSL",
            "IOT_BOOTSTRAP_SERVERS": "{mutual}",
            "IOT_TLS_CERTIFICATE_FILE": "{certificate}",
            "IOT_TLS_KEY_FILE": "{key}",
        },
        "refuses our certificate.*IOT_TLS_CERTIFICATE_FILE",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_why_the_broker_is_closed_is_found_out(
    case: str, secure_broker: SecureBroker, stranger: Authority, tmp_path: Path
) -> None:
    changes, words = REFUSALS[case]
    known = secure_broker.environment("iot-producer")
    identity = stranger.issue("iot-producer")
    places = {
        "wrong": write_secret(tmp_path / "wrong", "wrong\n"),
        "empty": write_secret(tmp_path / "empty", "\n"),
        "stranger": stranger.certificate,
        "certificate": identity.certificate,
        "key": identity.key,
        "port": secure_broker.bootstrap_servers.rpartition(":")[2],
        "mutual": secure_broker.mutual_servers,
    }
    environment = known | {name: value.format(**places) for name, value in changes.items()}
    if environment["IOT_SECURITY_PROTOCOL"] != "SASL_SSL":
        environment |= {"IOT_SASL_USERNAME": "", "IOT_SASL_PASSWORD_FILE": ""}
    if environment["IOT_SECURITY_PROTOCOL"] == "PLAINTEXT":
        environment["IOT_TLS_CA_FILE"] = ""
    assert find_problem(load(ProduceSettings, environment=known)) == ""
    problem = find_problem(load(ProduceSettings, environment=environment))
    assert re.search(words, problem), problem


def test_tls_at_a_port_without_it(running: Pipeline, secure_broker: SecureBroker) -> None:
    environment = secure_broker.environment("iot-producer")
    environment["IOT_BOOTSTRAP_SERVERS"] = running.broker.bootstrap_servers
    problem = find_problem(load(ProduceSettings, environment=environment))
    assert re.search("IOT_SECURITY_PROTOCOL", problem), problem


def test_a_wrong_password_is_told_and_waited_for(
    secure_pipeline: Pipeline, secure_broker: SecureBroker, tmp_path: Path
) -> None:
    file = write_secret(tmp_path / "password", "wrong\n")
    app = secure_pipeline.produce("--count", "1", "--sasl-password-file", str(file)).start()
    wait_for(lambda: "refuses user 'iot-producer'" in app.output(), "the reason")
    assert app.running
    file.write_text(secure_broker.passwords["iot-producer"] + "\n")
    assert app.wait(40) == 0, app.output()
    assert secure_pipeline.produced() == 1


def test_the_audit_says_what_is_wrong_and_ends(secure_pipeline: Pipeline, tmp_path: Path) -> None:
    file = write_secret(tmp_path / "password", "wrong\n")
    done = secure_pipeline.run("audit", "--sasl-password-file", str(file))
    assert done.returncode == Exit.UNREACHABLE, done
    assert "refuses user 'iot-audit': check IOT_SASL_USERNAME" in done.stderr


def test_a_producer_without_an_acl_says_which(ungranted: Pipeline) -> None:
    app = ungranted.produce("--count", "1").start()
    assert app.wait(60) == Exit.CONFIG, app.output()
    assert (
        f"does not let user 'iot-producer' write to topic {ungranted.image_topic}: grant it WRITE"
    ) in app.output()


def test_a_producer_that_may_write_to_no_topic_at_all_says_what_to_grant(
    secure_pipeline: Pipeline, secure_broker: SecureBroker, tmp_path: Path
) -> None:
    """Then Kafka refuses it an id already, before it is asked for the topic."""
    file = write_secret(tmp_path / "password", secure_broker.passwords["iot-audit"])
    who = ("--sasl-username", "iot-audit", "--sasl-password-file", str(file))
    app = secure_pipeline.produce("--count", "1", *who).start()
    assert app.wait(60) == Exit.CONFIG, app.output()
    topic = secure_pipeline.image_topic
    assert f"does not let user 'iot-audit' write to topic {topic}: grant it WRITE" in app.output()


def test_a_consumer_waits_for_topics_that_it_may_not_see(
    ungranted: Pipeline, secure_broker: SecureBroker
) -> None:
    app = ungranted.store().start()
    words = "no such topic, or user 'iot-storage' may not read it"
    wait_for(lambda: words in app.output(), "the reason")
    assert ungranted.image_topic in app.output()
    secure_broker.allow(pipeline_acls(ungranted.prefix))
    app.wait_ready(60)


def test_a_consumer_without_an_acl_for_its_group_says_which(
    ungranted: Pipeline, secure_broker: SecureBroker
) -> None:
    granted = pipeline_acls(ungranted.prefix)
    secure_broker.allow(entry for entry in granted if entry["resource_type"] != "group")
    app = ungranted.store().start()
    assert app.wait(60) == Exit.CONFIG, app.output()
    group = f"{ungranted.prefix}iot-storage"
    assert f"does not let user 'iot-storage' use consumer group {group}: grant it READ" in (
        app.output()
    )


def test_the_audit_without_an_acl_says_which(ungranted: Pipeline) -> None:
    done = ungranted.run("audit")
    assert done.returncode == Exit.UNREACHABLE, done
    assert f"user 'iot-audit' may not read it: {ungranted.image_topic}" in done.stderr


def test_the_audit_without_an_acl_for_a_group_says_which(
    ungranted: Pipeline, secure_broker: SecureBroker
) -> None:
    granted = pipeline_acls(ungranted.prefix)
    secure_broker.allow(entry for entry in granted if entry["resource_type"] != "group")
    done = ungranted.run("audit")
    assert done.returncode == Exit.CONFIG, done
    group = f"{ungranted.prefix}iot-inference"
    assert f"let user 'iot-audit' look at consumer group {group}: grant it DESCRIBE" in done.stderr


def test_both_passwords_are_known_while_one_changes(
    secure_pipeline: Pipeline, secure_broker: SecureBroker, tmp_path: Path
) -> None:
    both = f"next-one\n{secure_broker.passwords['iot-producer']}\n"
    file = write_secret(tmp_path / "password", both)
    app = secure_pipeline.produce("--count", "2", "--sasl-password-file", str(file)).start()
    assert app.wait(40) == 0, app.output()
    assert secure_pipeline.produced() == 2


def set_password(broker: SecureBroker, user: str, password: str) -> None:
    """The broker's side of a new password."""
    change = UserScramCredentialUpsertion(user, ScramMechanism.SCRAM_SHA_512, password)
    with broker.admin() as admin:
        assert admin.alter_user_scram_credentials([change]) == {user: None}


def test_passwords_change_under_running_services_and_nothing_is_lost(
    secure_pipeline: Pipeline,
    secure_broker: SecureBroker,
    tmp_path: Path,
    assert_clean: Callable[[Pipeline, int], None],
) -> None:
    files = {
        user: write_secret(tmp_path / user, secure_broker.passwords[user] + "\n")
        for user in ("iot-producer", "iot-inference", "iot-storage")
    }

    def own(user: str) -> tuple[str, str]:
        return ("--sasl-password-file", str(files[user]))

    store = secure_pipeline.store(*own("iot-storage")).start()
    infer = secure_pipeline.infer(*own("iot-inference")).start()
    producer = secure_pipeline.produce("--interval", "0.2", *own("iot-producer")).start()
    apps = {"iot-producer": producer, "iot-inference": infer, "iot-storage": store}
    for app in apps.values():
        app.wait_ready()
    before = {user: app.pid for user, app in apps.items()}
    changed = {user: secrets.token_urlsafe(24) for user in files}
    try:
        for user, password in changed.items():
            set_password(secure_broker, user, password)
        images = secure_pipeline.produced()
        wait_for(lambda: secure_pipeline.produced() > images + 5, "images on old connections")
        # Connections that stand are not asked again. These end, and the old password with them.
        secure_broker.stop()
        secure_broker.start().wait_ready()
        for user, app in apps.items():
            wait_for(lambda a=app: "refuses user" in a.output(), f"{user} to be refused", 40)  # type: ignore[misc]
        for user, password in changed.items():
            files[user].write_text(password + "\n")
        images = secure_pipeline.produced()
        wait_for(lambda: secure_pipeline.produced() > images + 10, "images again")
        assert producer.stop() == 0, producer.output()
        assert_clean(secure_pipeline, secure_pipeline.produced())
        assert {user: app.pid for user, app in apps.items() if app is not producer} == {
            user: pid for user, pid in before.items() if apps[user] is not producer
        }
    finally:
        for user in files:
            set_password(secure_broker, user, secure_broker.passwords[user])


class TlsFront:
    """Takes TLS connections and hands them on in the clear, as a proxy before a database does."""

    def __init__(self, authority: Authority, target: str) -> None:
        self._target = target
        identity = authority.issue("database")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.certificate, identity.key)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()
        self._inside: list[ssl.SSLSocket] = []

    def _serve(self) -> None:
        while True:
            try:
                plain, _address = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(plain,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, plain: socket.socket) -> None:
        host, _, port = self._target.partition(":")
        with plain:
            try:
                inside = self._context.wrap_socket(plain, server_side=True)
            except OSError:  # the client does not trust us
                return
            self._inside.append(inside)
            with inside, socket.create_connection((host, int(port))) as outside:
                back = threading.Thread(target=self._copy, args=(outside, inside), daemon=True)
                back.start()
                self._copy(inside, outside)
                back.join(5)

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def hang_up(self) -> None:
        """Close the connections that are open, as a server does with idle ones."""
        for connection in self._inside:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture(params=["database", "mongodb"])
def server(request: pytest.FixtureRequest) -> Database:
    server: Database = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def front(authority: Authority, server: Database) -> Iterator[TlsFront]:
    url = server.environment("over-tls")["IOT_STORE_URL"]
    front = TlsFront(authority, url.split("/")[2])
    yield front
    front.close()


def through(front: TlsFront, host: str, server: Database, ca_file: Path, timeout: str) -> Store:
    """A store whose every connection goes through the front."""
    environment = server.environment("over-tls")
    scheme, _, _, name = environment["IOT_STORE_URL"].split("/")
    environment["IOT_STORE_URL"] = f"{scheme}//{host}:{front.port}/{name}?tls=true"
    environment |= {"IOT_STORE_CA_FILE": str(ca_file), "IOT_STORE_TIMEOUT": timeout}
    return open_store(load(StoreSettings, environment=environment))


def test_the_database_over_tls(front: TlsFront, authority: Authority, server: Database) -> None:
    server.create("over-tls")
    with through(front, "localhost", server, authority.certificate, "15") as store:
        outcome = store.merge_in({"a": {"_id": "a", "GroundTruth": "cat"}}, lambda: None)
        assert list(outcome.stored) == ["a"]
        assert store.read(["a"])["a"]["GroundTruth"] == "cat"
        # A connection that the server has closed while it was idle is not an outage.
        front.hang_up()
        time.sleep(0.1)
        assert store.read(["a"])["a"]["GroundTruth"] == "cat"


@pytest.mark.parametrize(
    "host,trusted,words",
    [
        ("localhost", False, "certificate is refused .*IOT_STORE_CA_FILE"),
        ("127.1", True, "is not for 127.1: call it in IOT_STORE_URL"),
    ],
)
def test_a_database_that_cannot_prove_who_it_is_gets_no_password(
    front: TlsFront,
    authority: Authority,
    stranger: Authority,
    server: Database,
    host: str,
    trusted: bool,
    words: str,
) -> None:
    ca_file = (authority if trusted else stranger).certificate
    with (
        through(front, host, server, ca_file, "3") as store,
        pytest.raises(SinkUnavailable, match=words),
    ):
        store.read(["a"])


def test_a_new_authority_is_taken_up(
    front: TlsFront, authority: Authority, stranger: Authority, server: Database, tmp_path: Path
) -> None:
    server.create("over-tls")
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(stranger.certificate.read_bytes())
    with through(front, "localhost", server, ca_file, "3") as store:
        with pytest.raises(SinkUnavailable, match="certificate is refused"):
            store.read(["a"])
        ca_file.write_bytes(authority.certificate.read_bytes())
        store.read(["a"])
