"""Passwords and certificates are read for each connection, and what is no broker is told apart."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kafka.errors import KafkaConnectionError, SaslAuthenticationFailedError
from kafka.net.sasl import get_sasl_mechanism

from iot_pipeline.access import Tls, find_problem, security_options
from iot_pipeline.errors import ConfigError
from iot_pipeline.settings import ProduceSettings, load, split_address


@pytest.fixture
def settings(tmp_path: Path) -> ProduceSettings:
    (tmp_path / "password").write_text("first\n")
    return ProduceSettings(
        security_protocol="SASL_SSL",
        sasl_username="iot",
        sasl_password_file=str(tmp_path / "password"),
    )


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_each_connection_reads_the_password(settings: ProduceSettings, mechanism: str) -> None:
    options = security_options(settings)
    make = get_sasl_mechanism(mechanism)

    def password() -> bytes:
        made = make(**options | {"sasl_mechanism": mechanism})
        if mechanism == "PLAIN":
            return bytes(made.auth_bytes().split(b"\0")[2])
        return bytes(made._scram_client.password)

    assert password() == b"first"
    Path(settings.sasl_password_file).write_text("second\n")
    assert password() == b"second"


def test_what_holds_the_options_holds_no_password(settings: ProduceSettings) -> None:
    assert "first" not in repr(security_options(settings))


def test_a_password_as_text_still_serves_other_clients() -> None:
    made = get_sasl_mechanism("PLAIN")(sasl_plain_username="u", sasl_plain_password="p")
    assert made.auth_bytes() == b"u\0u\0p"


@pytest.mark.parametrize("text", [None, "", "\n", b"\xff"])
def test_a_password_file_without_one_is_a_failure_to_try_again(
    settings: ProduceSettings, text: str | bytes | None
) -> None:
    file = Path(settings.sasl_password_file)
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SaslAuthenticationFailedError, match="IOT_SASL_PASSWORD_FILE"):
        get_sasl_mechanism("PLAIN")(**security_options(settings) | {"sasl_mechanism": "PLAIN"})


def test_while_a_password_changes_clients_find_the_one_that_is_taken(
    settings: ProduceSettings,
) -> None:
    Path(settings.sasl_password_file).write_text("new\nold\n")
    options = security_options(settings) | {"sasl_mechanism": "PLAIN"}

    def log_in(right: str) -> list[str]:
        """What a client tries until it is let in."""
        tried: list[str] = []
        while right not in tried:
            made = get_sasl_mechanism("PLAIN")(**options)
            tried.append(made.auth_bytes().split(b"\0")[2].decode())
            if tried[-1] == right:
                made.receive(b"")
        return tried

    assert log_in("old") == ["new", "old"]
    assert log_in("old") == ["old"], "it does not begin with the one that was taken"
    assert log_in("new") == ["old", "new"]
    assert log_in("new") == ["new"]
    Path(settings.sasl_password_file).write_text("newest\n")
    assert log_in("newest") == ["newest"]


def test_certificates_that_cannot_be_used_are_an_outage(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with socket.socket() as plain, pytest.raises(KafkaConnectionError, match="IOT_TLS_CA_FILE"):
        Tls(str(tmp_path / "ca.pem")).wrap_socket(plain, server_hostname="broker")


def test_servers_are_checked_by_certificate_and_name() -> None:
    context = Tls().context()
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert context.minimum_version.name == "TLSv1_2"


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A port where each client gets these bytes, and a hang-up; None: silence."""
    done = threading.Event()

    def serve() -> None:
        while True:
            try:
                client, _address = listener.accept()
            except OSError:
                return
            with client:
                client.recv(1024)
                if answer is None:
                    done.wait(30)
                else:
                    client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "answer,words",
    [
        (b"", r"wants TLS on this port \(IOT_SECURITY_PROTOCOL\)"),
        (b"\x15\x03\x03\x00\x02\x02\x50", r"wants TLS on this port \(IOT_SECURITY_PROTOCOL\)"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "IOT_SECURITY_PROTOCOL"),
        (b"\0\0\0\x06\0\0\0\x01\0\0", r"answers unlike Kafka .*IOT_BOOTSTRAP_SERVERS"),
        (None, "does not answer within 0.5 s"),
    ],
)
def test_what_is_no_broker_is_told_apart(
    answer: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iot_pipeline.access.PROBE_SECONDS", 0.5)
    with server(answer) as port:
        chosen = ProduceSettings(bootstrap_servers=f"127.0.0.1:{port}")
        problem = find_problem(chosen)
    assert re.search(words, problem), problem


def test_each_server_is_tried_and_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        problem = find_problem(
            ProduceSettings(bootstrap_servers=f"127.0.0.1:{port}, no-such-host.invalid:1")
        )
    assert (
        f"127.0.0.1:{port}: Connection refused (IOT_BOOTSTRAP_SERVERS); no-such-host.invalid:1: "
        in problem
    )


@pytest.mark.parametrize(
    "servers",
    [
        *("broker:x", "broker:0", ":9092", "broker:70000", "broker:", "broker:-1", "broker:+1"),
        *("127.0.0.1:1,,b:2", "a:1,", ",a:1", " ", "a:1 b:2", "a b:1", "a:1;b:2", "a;b:1"),
        *("PLAINTEXT://a:1", "SSL://a:1,b:2", "http://a:1/", "user@a:1", "a/b:1", "a:1/2"),
        *("::1", "::1:9092", "[::1", "[a:1", "[]:1", "[broker]:1", "broker:9092:9093"),
        *("broker:\u0661", "'a:1'", '"a:1"', "[a:1,b:2]", "-", "."),
    ],
)
def test_servers_that_cannot_work_are_refused_at_once(servers: str) -> None:
    with pytest.raises(ConfigError, match=r"IOT_BOOTSTRAP_SERVERS .*host:port"):
        ProduceSettings(bootstrap_servers=servers)


def test_servers_are_taken_one_by_one() -> None:
    named = " a , b.example.org:1,\tb\u00fccher.example:65535 ,[::1]:2,[fe80::1],192.0.2.1:3,a_b:4"
    found = [split_address(server) for server in ProduceSettings(bootstrap_servers=named).servers]
    assert found == [
        ("a", 9092),
        ("b.example.org", 1),
        ("b\u00fccher.example", 65535),
        ("::1", 2),
        ("fe80::1", 9092),
        ("192.0.2.1", 3),
        ("a_b", 4),
    ]


@pytest.mark.parametrize("name", [".", "..", "a b", "a/b", "a,b", "\u00e4", "a" * 250])
@pytest.mark.parametrize("topic", ["image_topic", "prediction_topic", "dead_letter_topic"])
def test_a_topic_that_cannot_be_is_refused_at_once(topic: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"IOT_{topic.upper()} "):
        load(ProduceSettings, {topic: name}, {})


@pytest.mark.parametrize(
    "one,other",
    [
        ("image_topic", "prediction_topic"),
        ("image_topic", "dead_letter_topic"),
        ("prediction_topic", "dead_letter_topic"),
    ],
)
def test_no_stage_reads_what_it_writes(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"IOT_{one.upper()} and IOT_{other.upper()} "):
        load(ProduceSettings, {one: "same", other: "same"}, {})
