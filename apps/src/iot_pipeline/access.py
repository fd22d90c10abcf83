"""How a connection proves who we are, and what keeps a broker from letting us in.

Certificates and passwords are read from their files for each new connection. So one that was
renewed needs no restart, a connection that was refused tries the new one, and no object that lives
on, nor anything that logs one, holds a password.
"""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

from kafka.errors import (
    CorrelationIdError,
    InvalidReceiveError,
    KafkaConnectionError,
    KafkaError,
    KafkaProtocolError,
    NoError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
    for_code,
)

from iot_pipeline.kafka_internals import (
    ApiVersionsRequest,
    BrokerVersionData,
    KafkaProtocol,
    MetadataRequest,
    SaslAuthenticateRequest,
    SaslHandshakeRequest,
    SaslMechanism,
    SaslMechanismPlain,
    SaslMechanismScram,
    get_sasl_mechanism,
    register_sasl_mechanism,
)
from iot_pipeline.passwords import PasswordFile
from iot_pipeline.settings import Settings, split_address

PROBE_SECONDS = 5.0
# No further broker is asked after this: whoever asks gives no sign of life meanwhile.
PROBES_SECONDS = 15.0


class _WithPasswordFile(SaslMechanism):  # type: ignore[misc] # it has no types
    """A mechanism, made anew for each connection, that reads the password only then."""

    def __init__(self, **config: Any) -> None:
        password = config["sasl_plain_password"]
        self._file = password if isinstance(password, PasswordFile) else None
        if self._file:
            try:
                self._place, config["sasl_plain_password"] = self._file.choose()
            except (OSError, ValueError) as error:
                # It may be there in a moment: this is for the client to try again.
                raise SaslAuthenticationFailedError(f"IOT_SASL_PASSWORD_FILE: {error}") from error
        super().__init__(**config)

    def receive(self, auth_bytes: bytes) -> Any:
        """Take the server's answer; a refusal never comes this far."""
        answer = super().receive(auth_bytes)
        if self._file and self.is_authenticated():
            self._file.keep(self._place)
        return answer


class _Scram(_WithPasswordFile, SaslMechanismScram):  # type: ignore[misc] # it has no types
    pass


class _Plain(_WithPasswordFile, SaslMechanismPlain):  # type: ignore[misc] # it has no types
    pass


register_sasl_mechanism("SCRAM-SHA-512", _Scram, overwrite=True)
register_sasl_mechanism("PLAIN", _Plain, overwrite=True)


@dataclass(frozen=True)
class Tls:
    """Makes TLS connections that check the server's certificate and the name in it.

    kafka-python takes it in the place of an `ssl.SSLContext`, of which it only calls `wrap_socket`.
    """

    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    def context(self) -> ssl.SSLContext:
        """A context with the files as they are now.

        Raises:
            OSError: one of them cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file:
            context.load_verify_locations(self.ca_file)
        else:
            context.load_default_certs()
        if self.certificate_file:
            # With an empty password, OpenSSL asks nobody for the one of an encrypted key.
            context.load_cert_chain(self.certificate_file, self.key_file, password="")
        return context

    def wrap_socket(self, sock: socket.socket, **options: Any) -> ssl.SSLSocket:
        """As `ssl.SSLContext.wrap_socket`.

        Raises:
            KafkaConnectionError: the files cannot be used at the moment.
        """
        try:
            context = self.context()
        except OSError as error:
            raise KafkaConnectionError(
                f"IOT_TLS_CA_FILE, IOT_TLS_CERTIFICATE_FILE, IOT_TLS_KEY_FILE: {error}"
            ) from error
        return context.wrap_socket(sock, **options)


def security_options(settings: Settings) -> dict[str, Any]:
    """What every Kafka client gets: admin client, consumer and producer."""
    options: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if settings.uses_tls:
        options["ssl_context"] = Tls(
            settings.tls_ca_file, settings.tls_certificate_file, settings.tls_key_file
        )
    if settings.uses_sasl:
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": PasswordFile(settings.sasl_password_file),
        }
    return options


def find_problem(settings: Settings) -> str:
    """What keeps all brokers from letting us in, or the empty string.

    kafka-python tries for its whole time limit whatever the cause, and then tells that it did not
    succeed. This goes the same way by itself, up to the first question that only a client who was
    let in may ask.
    """
    problems: list[str] = []
    until = time.monotonic() + PROBES_SECONDS
    for server in settings.servers:
        if time.monotonic() >= until:
            break
        problem = _problem_of(*split_address(server), settings)
        if not problem:
            return ""
        problems.append(f"{server}: {problem}")
    return "; ".join(problems)


def _problem_of(host: str, port: int, settings: Settings) -> str:
    problem = ""
    try:
        _log_in(host, port, settings)
    except ssl.SSLCertVerificationError as error:
        problem = certificate_problem(
            error, host, settings.tls_ca_file, "IOT_TLS_CA_FILE", "IOT_BOOTSTRAP_SERVERS"
        )
    except ssl.SSLError as error:
        problem = _tls_problem(error)
    except (_ClosedError, ConnectionResetError, InvalidReceiveError):
        problem = _silence_problem(settings)
    except TimeoutError:
        problem = f"does not answer within {PROBE_SECONDS:g} s (IOT_BOOTSTRAP_SERVERS)"
    except OSError as error:
        problem = f"{error.strerror or error} (IOT_BOOTSTRAP_SERVERS)"
    except SaslAuthenticationFailedError as error:
        problem = refused_problem(error, settings)
    except (KafkaProtocolError, CorrelationIdError, ValueError, LookupError, TypeError) as error:
        problem = f"answers unlike Kafka ({error}): is it the right port (IOT_BOOTSTRAP_SERVERS)?"
    except KafkaError as error:
        problem = str(error.args[0] if error.args else type(error).__name__)
    return problem


def _log_in(host: str, port: int, settings: Settings) -> None:
    """Come in with any of the passwords."""
    options = security_options(settings)
    try:
        count = len(options["sasl_plain_password"].read()) if settings.uses_sasl else 1
    except (OSError, ValueError):
        count = 1  # which then says what is wrong with the file
    for left in reversed(range(count)):
        try:
            _knock(host, port, settings, options)
        except SaslAuthenticationFailedError:
            if not left:
                raise
        else:
            return


def _knock(host: str, port: int, settings: Settings, options: dict[str, Any]) -> None:
    with socket.create_connection((host, port), timeout=PROBE_SECONDS) as plain:
        if not settings.uses_tls:
            _Knock(settings, options, plain).come_in()
        else:
            with options["ssl_context"].wrap_socket(plain, server_hostname=host) as encrypted:
                _Knock(settings, options, encrypted).come_in()


def certificate_problem(
    error: ssl.SSLCertVerificationError, host: str, ca_file: str, ca_setting: str, setting: str
) -> str:
    """Why a server's certificate is refused, and what to set.

    Args:
        error: the refusal.
        host: the server as we call it.
        ca_file: the authorities that are trusted; empty: the host's.
        ca_setting: the environment variable that names them.
        setting: the environment variable that names the server.
    """
    # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
    if error.verify_code in (62, 64):
        return f"its certificate is not for {host}: call it in {setting} as its certificate does"
    # X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
    if error.verify_code in (9, 10):
        return f"its certificate is refused ({error.verify_message}): renew it, or set the clocks"
    return (
        f"its certificate is refused ({error.verify_message.rstrip('.')}): is the authority that "
        f"signed it among those of {ca_setting} (now {ca_file or 'those of this host'})?"
    )


def _tls_problem(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    if "ALERT" in reason:
        return (
            f"refuses our certificate, or that there is none ({reason}): IOT_TLS_CERTIFICATE_FILE, "
            "IOT_TLS_KEY_FILE"
        )
    return (
        f"does not speak TLS on this port ({reason}): check IOT_SECURITY_PROTOCOL and "
        "IOT_BOOTSTRAP_SERVERS"
    )


def _silence_problem(settings: Settings) -> str:
    wanted = {
        "PLAINTEXT": "TLS on this port (IOT_SECURITY_PROTOCOL)",
        "SSL": "a user on this port (IOT_SECURITY_PROTOCOL=SASL_SSL)",
        "SASL_SSL": "something else on this port (IOT_SECURITY_PROTOCOL)",
    }
    return (
        "closes the connection without an answer that we understand: it is still starting, or "
        f"wants {wanted[settings.security_protocol]}"
    )


def refused_problem(error: KafkaError, settings: Settings) -> str:
    """What to look at after a broker did not take our password, or there was none to show."""
    text = error.args[0] if error.args else ""
    if str(text).startswith("IOT_SASL_PASSWORD_FILE"):
        return str(text)
    return (
        f"refuses {settings.principal}: check IOT_SASL_USERNAME and IOT_SASL_PASSWORD_FILE "
        f"({text or type(error).__name__})"
    )


class _ClosedError(Exception):
    """The broker has closed the connection where it should have answered."""


class _Knock:
    """One connection to one broker, up to the first answer that only who was let in gets."""

    def __init__(self, settings: Settings, options: dict[str, Any], sock: socket.socket) -> None:
        self._settings = settings
        self._options = options
        self._sock = sock
        self._until = time.monotonic() + PROBE_SECONDS
        self._parser = KafkaProtocol(client_id=settings.client_id)

    def come_in(self) -> None:
        """Ask what versions the broker speaks, say who we are, and ask for its cluster.

        Raises:
            KafkaError: the broker refuses.
            _ClosedError: it closes the connection.
            OSError, ValueError, LookupError, TypeError: it does not answer, or not as Kafka does.
        """
        # Every broker knows version 0 and takes it from anyone.
        answer = self._ask(ApiVersionsRequest(version=0))
        known = {key.api_key: (key.min_version, key.max_version) for key in answer.api_keys}
        if self._settings.uses_sasl:
            self._say_who()
        request = MetadataRequest(topics=[], allow_auto_topic_creation=False)
        request.API_VERSION = BrokerVersionData(api_versions=known).api_version(request)
        self._ask(request)

    def _say_who(self) -> None:
        wanted = self._settings.sasl_mechanism
        answer = self._ask(SaslHandshakeRequest(version=1, mechanism=wanted))
        if for_code(answer.error_code) is not NoError or wanted not in answer.mechanisms:
            taken = ", ".join(sorted(answer.mechanisms)) or "none"
            raise UnsupportedSaslMechanismError(
                f"does not take {wanted} on this port, but {taken}: check IOT_SASL_MECHANISM and "
                "IOT_SECURITY_PROTOCOL"
            )
        mechanism = get_sasl_mechanism(wanted)(**self._options)
        while not mechanism.is_done():
            answer = self._ask(
                SaslAuthenticateRequest(version=0, auth_bytes=mechanism.auth_bytes())
            )
            if for_code(answer.error_code) is not NoError:
                raise SaslAuthenticationFailedError(answer.error_message)
            mechanism.receive(answer.auth_bytes)

    def _ask(self, request: Any) -> Any:
        self._parser.send_request(request)
        try:
            self._sock.sendall(self._parser.send_bytes())
            while True:
                self._sock.settimeout(max(0.001, self._until - time.monotonic()))
                received = self._sock.recv(65_536)
                if not received:
                    raise _ClosedError
                for _number, answer in self._parser.receive_bytes(received):
                    return answer
        except ConnectionError as error:
            raise _ClosedError from error
