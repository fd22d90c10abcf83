"""A Kafka node on loopback that lets nobody in unknown and nobody do what is not granted.

It listens for users with a password (SASL_SSL with SCRAM-SHA-512 or PLAIN) and, on another port,
for those with a certificate (mutual TLS). The StandardAuthorizer denies what no ACL allows::

    with SecureBroker(folder) as broker, Pipeline(folder, broker, database) as pipeline:
        broker.allow(pipeline_acls(pipeline.prefix))
        pipeline.store().start().wait_ready()

Certificates are those of an authority made for this broker. Passwords and keys stand in files that
only we can read.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
)

from iot_lab.processes import LOOPBACK, QUICK_JAVA, Broker, free_port, wait_for

ADMIN = "kafka"
USERS = ("iot-producer", "iot-inference", "iot-storage", "iot-audit", "iot-operator")
MECHANISMS = ("SCRAM-SHA-512", "PLAIN")
NODE = "kafka-1"  # the node's own name, which its certificate bears
DAY = dt.timedelta(days=1)

_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def pipeline_acls(prefix: str = "") -> list[dict[str, Any]]:
    """What each app has to be granted, written as the role kafka_resources takes it.

    READ and WRITE each imply DESCRIBE. An idempotent producer needs WRITE on a topic and nothing of
    the cluster. The audit and the operator are in no group; the audit asks where the others stand.
    """
    images, predictions = f"{prefix}iot-topic", f"{prefix}iot-predictions"
    dead_letters = f"{prefix}iot-dead-letter"
    granted = [
        ("iot-producer", "topic", images, ["write"]),
        ("iot-inference", "topic", images, ["read"]),
        ("iot-inference", "group", f"{prefix}iot-inference", ["read"]),
        ("iot-inference", "topic", predictions, ["write"]),
        ("iot-inference", "topic", dead_letters, ["write"]),
        ("iot-storage", "topic", images, ["read"]),
        ("iot-storage", "topic", predictions, ["read"]),
        ("iot-storage", "group", f"{prefix}iot-storage", ["read"]),
        ("iot-storage", "topic", dead_letters, ["write"]),
        ("iot-audit", "topic", images, ["read"]),
        ("iot-audit", "topic", predictions, ["read"]),
        ("iot-audit", "topic", dead_letters, ["read"]),
        ("iot-audit", "group", f"{prefix}iot-inference", ["describe"]),
        ("iot-audit", "group", f"{prefix}iot-storage", ["describe"]),
        ("iot-operator", "topic", images, ["write"]),
        ("iot-operator", "topic", predictions, ["write"]),
        ("iot-operator", "topic", dead_letters, ["read", "write"]),
    ]
    return [
        {
            "principals": [f"User:{user}"],
            "resource_type": kind,
            "resource_name": name,
            "operations": operations,
        }
        for user, kind, name, operations in granted
    ]


@dataclass(frozen=True)
class Identity:
    """Files that show who one is: a certificate and its key, both PEM."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority, with all its files in one folder."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key: CertificateIssuerPrivateKeyTypes = ec.generate_private_key(ec.SECP256R1())
        public = self._key.public_key()
        usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / "ca.pem"
        """What those who trust it need."""
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, lifetime: dt.timedelta = DAY) -> Identity:
        """A certificate for `name` on this machine; one of a negative lifetime has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        names = [
            x509.DNSName(name),
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address(LOOPBACK)),
        ]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        identity = Identity(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        identity.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        write_secret(
            identity.key,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ).decode(),
        )
        return identity


class ExistingAuthority(Authority):
    """One that is there already, with a key of EC or RSA; what it issues stands in a folder."""

    def __init__(
        self, folder: Path, certificate: Path, key: CertificateIssuerPrivateKeyTypes
    ) -> None:
        self._folder = folder
        self._name = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
        self._key = key
        self.certificate = certificate


def write_secret(path: Path, text: str) -> Path:
    """Write a file that only we can read, and return its path."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


class SecureBroker(Broker):
    """A node with TLS on all of its listeners, users, and the StandardAuthorizer."""

    def __init__(self, folder: Path, java: Mapping[str, str] = QUICK_JAVA) -> None:
        super().__init__(folder, java)
        self._mutual_port = free_port()
        self.passwords = {name: secrets.token_urlsafe(24) for name in (ADMIN, *USERS)}
        self.authority = Authority(folder / "tls")
        self.ca_file = str(self.authority.certificate)
        self._password_files = {
            name: write_secret(folder / f"{name}.password", password)
            for name, password in self.passwords.items()
        }
        self._identities: dict[str, Identity] = {}

    @property
    def mutual_servers(self) -> str:
        """Where clients with a certificate connect to."""
        return f"{LOOPBACK}:{self._mutual_port}"

    def identity(self, user: str) -> Identity:
        """A certificate by which the other port knows `user`."""
        if user not in self._identities:
            self._identities[user] = self.authority.issue(user)
        return self._identities[user]

    def client(self, user: str = ADMIN, mechanism: str = MECHANISMS[0]) -> dict[str, Any]:
        """What kafka-python's clients need to connect as `user`; by default as an administrator."""
        return {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": "SASL_SSL",
            "ssl_cafile": self.ca_file,
            "sasl_mechanism": mechanism,
            "sasl_plain_username": user,
            "sasl_plain_password": self.passwords[user],
        }

    def settings(self, user: str = ADMIN, mechanism: str = MECHANISMS[0]) -> dict[str, str]:
        """The same, as the role kafka_resources takes it."""
        return {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": mechanism,
            "username": user,
            "password": self.passwords[user],
            "ca_file": self.ca_file,
        }

    def mutual_settings(self, user: str = ADMIN) -> dict[str, str]:
        """What one needs to connect to the other port as `user`, as the role takes it."""
        identity = self.identity(user)
        return {
            "security_protocol": "SSL",
            "ca_file": self.ca_file,
            "certificate_file": str(identity.certificate),
            "key_file": str(identity.key),
        }

    def environment(self, user: str, mechanism: str = MECHANISMS[0]) -> dict[str, str]:
        """The settings with which an app connects as `user`, with its password."""
        return {
            "IOT_BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "IOT_SECURITY_PROTOCOL": "SASL_SSL",
            "IOT_SASL_MECHANISM": mechanism,
            "IOT_SASL_USERNAME": user,
            "IOT_SASL_PASSWORD_FILE": str(self._password_files[user]),
            "IOT_TLS_CA_FILE": self.ca_file,
        }

    def mutual_environment(self, user: str) -> dict[str, str]:
        """The settings with which an app connects as `user`, with a certificate."""
        identity = self.identity(user)
        return {
            "IOT_BOOTSTRAP_SERVERS": self.mutual_servers,
            "IOT_SECURITY_PROTOCOL": "SSL",
            "IOT_TLS_CA_FILE": self.ca_file,
            "IOT_TLS_CERTIFICATE_FILE": str(identity.certificate),
            "IOT_TLS_KEY_FILE": str(identity.key),
        }

    def allow(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Grant what the entries say; their form is that of `pipeline_acls`.

        Raises:
            ProcessError: the broker refuses one.
        """
        acls = [
            ACL(
                principal,
                "*",
                ACLOperation[operation.upper()],
                ACLPermissionType.ALLOW,
                ResourcePattern(
                    ResourceType[entry["resource_type"].upper()],
                    entry["resource_name"],
                    ACLResourcePatternType[entry.get("pattern", "literal").upper()],
                ),
            )
            for entry in entries
            for principal in entry["principals"]
            for operation in entry["operations"]
        ]
        with self.admin() as admin:
            failed = admin.create_acls(acls)["failed"]
            if failed:
                raise self.error(f"refuses ACLs: {failed}")

            def granted() -> bool:
                found = {acl for each in acls for acl in admin.describe_acls(each)[0]}
                return found >= set(acls)

            wait_for(granted, "the ACLs to be known", 30)

    def _properties(self) -> dict[str, str]:
        own = self.authority.issue(NODE)
        # Kafka reads both from one file.
        key_store = write_secret(
            self.folder / "tls" / "node.pem", own.key.read_text() + own.certificate.read_text()
        )
        ports = {
            "CLIENT": self.bootstrap_servers,
            "MUTUAL": self.mutual_servers,
            "CONTROLLER": f"{LOOPBACK}:{self._controller_port}",
        }
        listeners = ",".join(f"{name}://{address}" for name, address in ports.items())
        admin = f'username="{ADMIN}" password="{self.passwords[ADMIN]}"'
        everybody = " ".join(f'user_{name}="{word}"' for name, word in self.passwords.items())
        module = "org.apache.kafka.common.security"
        return {
            **super()._properties(),
            "listeners": listeners,
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "CLIENT:SASL_SSL,MUTUAL:SSL,CONTROLLER:SSL",
            "inter.broker.listener.name": "CLIENT",
            "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
            "listener.name.client.sasl.enabled.mechanisms": ",".join(MECHANISMS),
            "listener.name.client.scram-sha-512.sasl.jaas.config": (
                f"{module}.scram.ScramLoginModule required {admin};"
            ),
            "listener.name.client.plain.sasl.jaas.config": (
                f"{module}.plain.PlainLoginModule required {admin} {everybody};"
            ),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(key_store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.ca_file,
            "listener.name.mutual.ssl.client.auth": "required",
            "listener.name.controller.ssl.client.auth": "required",
            # With a certificate one is who it was made for.
            "ssl.principal.mapping.rules": "RULE:^CN=([^,]+)$/$1/,DEFAULT",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:{ADMIN};User:{NODE}",
        }

    def _format_arguments(self) -> list[str]:
        arguments = super()._format_arguments()
        for name, password in self.passwords.items():
            arguments += ["--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]"]
        return arguments
