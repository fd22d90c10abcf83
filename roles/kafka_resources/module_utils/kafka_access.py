"""How this role's modules reach the brokers: as whom, over what, and what stands in the way."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

SCRAM = "SCRAM-SHA-512"
PLAIN = "PLAIN"

# The arguments that all modules have in common.
ARGUMENTS = {
    "bootstrap_servers": {"type": "str", "required": True},
    "client": {
        "type": "dict",
        "default": {},
        "options": {
            "security_protocol": {
                "type": "str",
                "choices": ["PLAINTEXT", "SSL", "SASL_SSL"],
                "default": "PLAINTEXT",
            },
            "sasl_mechanism": {"type": "str", "choices": [SCRAM, PLAIN], "default": SCRAM},
            "username": {"type": "str", "default": ""},
            "password": {"type": "str", "default": "", "no_log": True},
            "ca_file": {"type": "str", "default": ""},
            "certificate_file": {"type": "str", "default": ""},
            "key_file": {"type": "str", "default": ""},
        },
    },
    "timeout": {"type": "int", "default": 30},
}

# A broker says why it refuses a login; it takes a tenth of a second longer for that by itself.
AUTHENTICATION_FAILED = 58
UNSUPPORTED_MECHANISM = 33
LARGEST_ANSWER = 1_000_000  # bytes: what is larger is no answer of Kafka's
PAUSE = 0.5  # seconds between attempts

NOT_ALLOWED = "The client's user may not do this: make it one of super.users."


class Refused(Exception):
    """The broker does not let this user in."""


@dataclass(frozen=True)
class Client:
    """As whom one connects, and over what. Checked as far as that needs no broker."""

    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = SCRAM
    username: str = ""
    password: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        if self.has_users and not (self.username and self.password):
            raise ValueError("With SASL_SSL, set username and password in the client's settings.")
        if bool(self.certificate_file) != bool(self.key_file):
            raise ValueError(
                "Set both certificate_file and key_file in the client's settings, or neither."
            )

    @property
    def has_users(self) -> bool:
        """Whether one logs in with a name and a password."""
        return self.security_protocol == "SASL_SSL"

    def __repr__(self) -> str:
        return f"Client({self.security_protocol}, {self.username or 'nobody'})"

    def tls(self) -> ssl.SSLContext | None:
        """What TLS needs, or None for a connection without.

        Raises:
            ValueError: a file cannot be used.
        """
        if self.security_protocol == "PLAINTEXT":
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if self.ca_file:
                context.load_verify_locations(self.ca_file)
            else:
                context.load_default_certs()
        except OSError as error:
            raise ValueError(f"ca_file {self.ca_file}: {error.strerror or error}") from error
        if self.certificate_file:
            try:
                context.load_cert_chain(self.certificate_file, self.key_file)
            except OSError as error:
                files = f"certificate_file {self.certificate_file}, key_file {self.key_file}"
                raise ValueError(f"{files}: {error.strerror or error}") from error
        return context

    def options(self) -> dict[str, Any]:
        """The same for kafka-python."""
        options: dict[str, Any] = {
            "security_protocol": self.security_protocol,
            "ssl_context": self.tls(),
        }
        if self.has_users:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password,
            }
        return options


class Connection:
    """One connection to one broker, of our own.

    kafka-python's clients try a wrong password, or a certificate that they do not trust, until
    their time is up, and then say that there is no broker.
    """

    def __init__(self, server: str, context: ssl.SSLContext | None, timeout: float) -> None:
        """Connect.

        Raises:
            OSError: the broker does not answer, or is not the one that it should be.
        """
        from kafka.protocol.parser import KafkaProtocol

        host, _, port = server.strip().rpartition(":")
        host = host.strip("[]")
        self._socket = socket.create_connection((host, int(port)), timeout)
        try:
            if context:
                self._socket = context.wrap_socket(self._socket, server_hostname=host)
        except BaseException:
            self.close()
            raise
        self._protocol = KafkaProtocol(
            client_id="ansible", receive_message_max_bytes=LARGEST_ANSWER
        )

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, request: Any) -> Any:
        """Send a request and return the answer.

        Raises:
            OSError: there is none, or none of Kafka's.
        """
        from kafka.errors import KafkaError

        self._protocol.send_request(request)
        self._socket.sendall(self._protocol.send_bytes())
        while True:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("the broker hangs up: is this listener one for TLS?")
            try:
                for _, answer in self._protocol.receive_bytes(received):
                    return answer
            except KafkaError as error:
                raise ConnectionError(
                    "what answers does not speak Kafka's protocol: is this listener one for TLS?"
                ) from error

    def log_in(self, mechanism: str, username: str, password: str) -> None:
        """Show who one is.

        Raises:
            OSError: there is no answer.
            Refused: the broker does not know that name with that password.
            ValueError: the broker does not offer this kind of login.
        """
        from kafka.net.sasl.scram import ScramClient
        from kafka.protocol.sasl import SaslHandshakeRequest

        answer = self.ask(SaslHandshakeRequest(mechanism, version=1))
        if answer.error_code == UNSUPPORTED_MECHANISM:
            raise ValueError(
                f"The brokers do not offer {mechanism}, but {', '.join(answer.mechanisms)}."
            )
        if answer.error_code:
            raise Refused(f"error {answer.error_code}")
        if mechanism == PLAIN:
            self._authenticate(f"\0{username}\0{password}".encode())
            return
        scram = ScramClient(username, password, mechanism)
        scram.process_server_first_message(self._authenticate(scram.first_message()))
        scram.process_server_final_message(self._authenticate(scram.final_message()))

    def _authenticate(self, token: bytes) -> bytes:
        from kafka.protocol.sasl import SaslAuthenticateRequest

        answer = self.ask(SaslAuthenticateRequest(token, version=1))
        if answer.error_code:
            raise Refused(answer.error_message or f"error {answer.error_code}")
        token_back: bytes = answer.auth_bytes
        return token_back


def logs_in(server: str, client: Client, username: str, password: str, timeout: float) -> bool:
    """Tell whether a password of SCRAM's is right, by using it.

    Raises:
        OSError: the broker does not answer.
        ValueError: the broker offers no such login.
    """
    connection = Connection(server, client.tls(), timeout)
    try:
        connection.log_in(SCRAM, username, password)
    except Refused:
        return False
    finally:
        connection.close()
    return True


def knock(server: str, client: Client, timeout: float) -> None:
    """Connect the way that the client will.

    Raises:
        OSError: the broker does not answer.
        Refused: it does not let the client in.
        ValueError: it does not offer this kind of login.
    """
    from kafka.protocol.metadata import ApiVersionsRequest

    connection = Connection(server, client.tls(), timeout)
    try:
        if client.has_users:
            connection.log_in(client.sasl_mechanism, client.username, client.password)
        else:
            # Only an answer shows that the broker takes the certificate, or the lack of one.
            connection.ask(ApiVersionsRequest(version=0))
    finally:
        connection.close()


def first_that_answers(servers: list[str], client: Client, timeout: float) -> str:
    """Wait until one of the servers lets the client in, and return it.

    Raises:
        ValueError: none does within `timeout` seconds, or one says that waiting will not help.
    """
    deadline = time.monotonic() + timeout
    while True:
        problems = []
        for server in servers:
            try:
                knock(server, client, max(1.0, deadline - time.monotonic()))
            except Refused as error:
                who = f"{client.username} with {client.sasl_mechanism}"
                raise ValueError(f"{server} does not let in {who}: {error}") from error
            except OSError as error:
                problems.append(f"{server}: {explain_connection(error)}")
                if is_final(error):
                    raise ValueError(problems[-1]) from error
            else:
                return server
        if time.monotonic() + PAUSE > deadline:
            raise ValueError("; ".join(problems))
        time.sleep(PAUSE)


def is_final(error: OSError) -> bool:
    """Tell whether a failure to connect will be the same the next time."""
    # A broker that starts or stops, or that wants no TLS at all, just hangs up.
    return isinstance(error, ssl.SSLError) and not isinstance(
        error, ssl.SSLEOFError | ssl.SSLZeroReturnError
    )


def explain_connection(error: OSError) -> str:
    """Say why a connection failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}; see ca_file"
    if isinstance(error, ssl.SSLError):
        alert = re.search(r"alert (certificate required|.*)", str(error))
        if alert:
            return f"it refuses our certificate, or the lack of one: {error.reason}"
        return f"TLS fails: {error.reason or error}"
    return error.strerror or str(error) or type(error).__name__


def explain(error: Exception) -> str:
    """Say what a Kafka error means for who declared something."""
    from kafka.errors import AuthorizationError, SecurityDisabledError

    text = str(error) or type(error).__name__
    if isinstance(error, SecurityDisabledError):
        return f"The brokers keep no ACLs: set authorizer.class.name in their settings. ({text})"
    if isinstance(error, AuthorizationError):
        return f"{NOT_ALLOWED} ({text})"
    return text


@dataclass(frozen=True)
class Access:
    """What a module works through."""

    admin: Any
    """A KafkaAdminClient."""
    client: Client
    servers: list[str]
    server: str
    """One of them, that answers."""
    timeout: int

    def require(self, *operations: str) -> None:
        """See whether we may do these operations of the cluster's.

        Where we may not, brokers of 4.3 leave a question for all users without any answer.

        Raises:
            ValueError: we may not do all of them.
        """
        allowed = set(self.admin.describe_cluster()["authorized_operations"] or ())
        if not allowed.issuperset(operations):
            raise ValueError(NOT_ALLOWED)

    def wait_until(self, check: Callable[[], bool], what: str) -> None:
        """Ask until `check` is true: what one broker was told reaches the others a little later.

        Raises:
            ValueError: it is not within the timeout.
        """
        deadline = time.monotonic() + self.timeout
        while not check():
            if time.monotonic() > deadline:
                raise ValueError(f"Waited {self.timeout} s in vain until {what}.")
            time.sleep(PAUSE)


@contextmanager
def open_access(parameters: Mapping[str, Any], name: str) -> Iterator[Access]:
    """Connect as the parameters say.

    Raises:
        ValueError: the settings are wrong, or no broker lets us in.
        KafkaError: a broker answers wrongly.
    """
    from kafka.admin import KafkaAdminClient

    client = Client(**{key: value for key, value in parameters["client"].items() if value})
    servers = [server.strip() for server in parameters["bootstrap_servers"].split(",")]
    server = first_that_answers(servers, client, parameters["timeout"])
    milliseconds = parameters["timeout"] * 1000
    admin = KafkaAdminClient(
        **client.options(),
        bootstrap_servers=servers,
        client_id=f"ansible-{name}",
        request_timeout_ms=milliseconds,
        bootstrap_timeout_ms=milliseconds,
    )
    try:
        yield Access(admin, client, servers, server, parameters["timeout"])
    finally:
        admin.close()


def serve(
    what: str,
    arguments: Mapping[str, Any],
    run: Callable[[AnsibleModule], dict[str, Any]],
) -> None:
    """Run as an Ansible module: `run` returns its result, and its errors become the module's.

    Args:
        what: what the module reconciles, as its errors name it.
        arguments: those beside ARGUMENTS.
        run: does the work. Raises ValueError and KafkaError.
    """
    module = AnsibleModule(argument_spec={**ARGUMENTS, **arguments}, supports_check_mode=True)
    try:
        from kafka.errors import KafkaError
    except ImportError as error:
        module.fail_json(msg=missing_required_lib("kafka-python"), exception=str(error))
    servers = module.params["bootstrap_servers"]
    try:
        result = run(module)
    except ValueError as error:
        module.fail_json(msg=f"{what} were not reconciled through {servers}: {error}")
    except KafkaError as error:
        module.fail_json(msg=f"{what} were not reconciled through {servers}: {explain(error)}")
    module.exit_json(**result)
