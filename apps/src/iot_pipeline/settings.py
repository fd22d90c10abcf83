"""Every setting of every command, said once: name, default, unit and help.

A setting `max_batch_size` is the flag `--max-batch-size` and the environment variable
`IOT_MAX_BATCH_SIZE`. A flag wins over the environment, the environment over the settings file, and
that over the default. What is about one run of a command, such as `--yes`, only its command line
says.
"""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import math
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints
from urllib.parse import unquote

from iot_pipeline.env_file import read_env_file
from iot_pipeline.errors import ConfigError, UsageError

SETTINGS_DIRECTORY = Path("/etc/iot-pipeline")

# A service that gives no sign of life for 30 s is restarted as one that hangs, and one that is to
# stop waits 20 s for what is in hand: a request that nobody answers has to end before.
MAX_STORE_TIMEOUT = 20.0  # seconds
# MongoDB's limit of a document, which an image becomes; CouchDB's is lower.
MAX_RECORD_BYTES = 16 * 1024 * 1024
# A quarter of a gibibyte of pixels: above it Pillow itself takes an image for an attack.
MAX_IMAGE_PIXELS = 89_478_485
MAX_COUNT = 10**12  # more images than a topic ever had
MONTH = 30 * 86_400  # seconds

_ADDRESS = re.compile(
    r"(?:(?P<host>\w[\w.-]*)|\[(?P<address>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\])(?::(?P<port>[0-9]{1,5}))?"
)
_TOPIC = re.compile("[a-zA-Z0-9._-]{1,249}")

_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def setting(  # noqa: PLR0913 - all but two by name
    default: Any,
    help: str,  # noqa: A002
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    limit: str = "",
    required: bool = False,
    metavar: str = "",
    positional: bool = False,
    flag_only: bool = False,
) -> Any:
    """Declare a setting.

    Args:
        default: a value, or a function that finds one on this host.
        help: what it does, as `--help` shows it.
        unit: of a number, also shown by `--help`.
        choices: the only values allowed.
        minimum: the smallest number allowed.
        maximum: the largest number allowed.
        limit: why it is the largest, where that is not plain.
        required: whether the empty string is refused.
        metavar: what `--help` shows for the value.
        positional: whether it is what the command is about, which needs no flag; unless required,
            any number of words.
        flag_only: whether it is about one run of the command, so that neither the environment nor
            a settings file may say it. What is positional is so too.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": tuple(choices),
        "minimum": minimum,
        "maximum": maximum,
        "limit": limit,
        "required": required,
        "metavar": metavar,
        "positional": positional,
        "flag_only": flag_only or positional,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """What `load` and the command line have to know of a command's settings."""

    SERVICE: ClassVar[str] = ""
    """The systemd unit's name, which is also the settings file's and the dead letters' `stage`."""
    SETTINGS_FILES: ClassVar[tuple[str, ...]] = ()
    """Settings files to look for, by service; the first that exists is read."""
    DESCRIPTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check what one value alone does not show.

        Raises:
            ConfigError: values do not go together.
        """


@dataclass(frozen=True, kw_only=True)
class Settings(CommandSettings):
    """What every command with a connection to Kafka needs."""

    bootstrap_servers: str = setting(
        "localhost:9092", "Kafka brokers as host:port, separated by commas", required=True
    )
    security_protocol: str = setting(
        "PLAINTEXT",
        "how to talk to the brokers: PLAINTEXT, in the clear; SSL, over TLS, where a certificate "
        "says who we are if the brokers ask; SASL_SSL, over TLS with user and password",
        required=True,
        metavar="PLAINTEXT|SSL|SASL_SSL",
    )
    sasl_mechanism: str = setting(
        "SCRAM-SHA-512",
        "how the password is proved: SCRAM-SHA-512, without showing it, or PLAIN",
        choices=("SCRAM-SHA-512", "PLAIN"),
    )
    sasl_username: str = setting("", "Kafka user")
    sasl_password_file: str = setting(
        "",
        "file with the Kafka user's password; while it is changed, with both, one a line",
        metavar="FILE",
    )
    tls_ca_file: str = setting(
        "",
        "PEM file of the authorities that may have signed the brokers' certificates; empty takes "
        "this host's",
        metavar="FILE",
    )
    tls_certificate_file: str = setting(
        "", "PEM file of our own certificate and its chain", metavar="FILE"
    )
    tls_key_file: str = setting(
        "", "PEM file of our certificate's key, not encrypted", metavar="FILE"
    )
    image_topic: str = setting("iot-topic", "topic of the images", required=True)
    prediction_topic: str = setting("iot-predictions", "topic of the predictions", required=True)
    dead_letter_topic: str = setting(
        "iot-dead-letter", "topic of the records that cannot be handled", required=True
    )
    max_record_bytes: int = setting(
        1_000_000,
        "largest record, key and headers included, that is sent or taken",
        unit="bytes",
        minimum=1024,
        maximum=MAX_RECORD_BYTES,
        limit="MongoDB takes no larger document",
    )
    log_level: str = setting(
        "info", "least severe events to log", choices=("debug", "info", "warning", "error")
    )
    metrics_host: str = setting("127.0.0.1", "address to serve Prometheus metrics on")
    metrics_port: int = setting(
        0, "port to serve Prometheus metrics on; 0 serves none", minimum=0, maximum=65535
    )

    @property
    def servers(self) -> list[str]:
        """The brokers to ask first, one by one."""
        return [server.strip() for server in self.bootstrap_servers.split(",")]

    @property
    def uses_tls(self) -> bool:
        """Whether connections to Kafka are encrypted."""
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def uses_sasl(self) -> bool:
        """Whether we say who we are with user and password."""
        return self.security_protocol == "SASL_SSL"

    @property
    def principal(self) -> str:
        """Who we are to Kafka, as messages name it."""
        if self.uses_sasl:
            return f"user {self.sasl_username!r}"
        if self.tls_certificate_file:
            return f"the user of {self.tls_certificate_file}"
        return "a client without user and certificate"

    @property
    def instance(self) -> str:
        """Which of several that do the same this is."""
        return socket.gethostname()

    @property
    def client_id(self) -> str:
        """What the brokers' logs and tools call our connections."""
        return f"{self.SERVICE}-{self.instance}"

    def __post_init__(self) -> None:
        """Check what cannot work, and what secures the connections to Kafka.

        Raises:
            ConfigError: it would not, or not as it looks.
        """
        super().__post_init__()
        for server in self.servers:
            split_address(server)
        self._check_topics()
        protocol = self.security_protocol
        if protocol == "SASL_PLAINTEXT":
            raise ConfigError(
                "IOT_SECURITY_PROTOCOL=SASL_PLAINTEXT is refused, since it shows the password or "
                "what it can be guessed from to the network: set SASL_SSL"
            )
        if protocol not in ("PLAINTEXT", "SSL", "SASL_SSL"):
            raise ConfigError(
                f"IOT_SECURITY_PROTOCOL must be one of PLAINTEXT, SSL, SASL_SSL, not {protocol!r}"
            )
        if self.uses_sasl:
            for name in ("sasl_username", "sasl_password_file"):
                if not getattr(self, name):
                    raise ConfigError(
                        f"IOT_SECURITY_PROTOCOL=SASL_SSL needs {environment_name(name)}"
                    )
        # What looks like protection and is none is a mistake, not a spare value.
        self._refuse_without(self.uses_sasl, "SASL_SSL", "sasl_username", "sasl_password_file")
        files = ("tls_ca_file", "tls_certificate_file", "tls_key_file")
        self._refuse_without(self.uses_tls, "SSL or SASL_SSL", *files)
        if bool(self.tls_certificate_file) != bool(self.tls_key_file):
            given, lacking = "IOT_TLS_CERTIFICATE_FILE", "IOT_TLS_KEY_FILE"
            if self.tls_key_file:
                given, lacking = lacking, given
            raise ConfigError(f"{given} needs {lacking}: the two belong together")
        for name in ("sasl_password_file", *files):
            _check_readable(name, getattr(self, name))

    def _check_topics(self) -> None:
        names = ("image_topic", "prediction_topic", "dead_letter_topic")
        for name in names:
            topic = getattr(self, name)
            if not _TOPIC.fullmatch(topic) or topic in (".", ".."):
                raise ConfigError(
                    f"{environment_name(name)} must be a topic's name, of at most 249 letters, "
                    f"digits, dots, hyphens and underscores, not {topic!r}"
                )
        # A stage that reads what it writes would never come to an end.
        for one, other in itertools.combinations(names, 2):
            if getattr(self, one) == getattr(self, other):
                raise ConfigError(
                    f"{environment_name(one)} and {environment_name(other)} must be two topics, "
                    f"not both {getattr(self, one)!r}"
                )

    def _refuse_without(self, used: bool, protocol: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) and not used:
                raise ConfigError(
                    f"{environment_name(name)} has no effect with IOT_SECURITY_PROTOCOL="
                    f"{self.security_protocol}: set {protocol}, or leave it out"
                )


def split_address(server: str) -> tuple[str, int]:
    """`host:port`, `[address]:port` or `host` as host and port.

    Raises:
        ConfigError: it is none of these.
    """
    found = _ADDRESS.fullmatch(server.strip())
    port = int((found and found["port"]) or 9092)
    if not found or not 0 < port < 65536:
        raise ConfigError(
            f"IOT_BOOTSTRAP_SERVERS (--bootstrap-servers) must list brokers as host:port, "
            f"separated by commas; {server!r} is none"
        )
    return found["host"] or found["address"], port


def _check_readable(name: str, path: str) -> None:
    if not path:
        return
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{environment_name(name)}: {error}") from error


def _cache_directory() -> str:
    # systemd makes the first for a service that has a StateDirectory.
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return state or str(Path(caches) / "iot-pipeline")


@dataclass(frozen=True, kw_only=True)
class ProduceSettings(Settings):
    """`iot-pipeline produce`."""

    SERVICE = "iot-producer"
    SETTINGS_FILES = ("iot-producer",)
    DESCRIPTION = "Send labelled images to Kafka at a steady pace."

    source: str = setting(
        "sample",
        "where images come from: sample (drawings that ship with this package), cifar10 (the "
        "official archive, downloaded once), or the path of a folder or tar of class-named "
        "folders, or of a local cifar-10-python.tar.gz; a path that is not there is waited for",
        required=True,
        metavar="sample|cifar10|PATH",
    )
    source_url: str = setting(
        "", "mirror to download cifar-10-python.tar.gz from instead of its home", metavar="URL"
    )
    cache_dir: str = setting(_cache_directory, "folder for downloads", metavar="DIR")
    interval: float = setting(
        10.0,
        "time from one image to the next; 0 sends as fast as the broker takes them",
        unit="seconds",
        minimum=0,
        maximum=MONTH,
    )
    count: int = setting(
        0,
        "images to send before ending, with a progress bar on a terminal; 0 goes on for ever",
        minimum=0,
        maximum=MAX_COUNT,
    )
    compression: str = setting(
        "zstd", "how images are compressed on their way", choices=("none", "gzip", "lz4", "zstd")
    )
    shuffle: bool = setting(False, "send the images in random order")
    seed: int = setting(0, "seed of the random order", minimum=0, maximum=2**32 - 1)
    source_name: str = setting(
        socket.gethostname, "name of this device in its messages", required=True, metavar="NAME"
    )

    @property
    def instance(self) -> str:
        """Which of several that do the same this is."""
        return self.source_name


@dataclass(frozen=True, kw_only=True)
class ConsumerSettings(Settings):
    """What every command with a consumer group needs."""

    group_id: str = setting("", "consumer group", required=True)
    group_instance_id: str = setting(
        socket.gethostname,
        "name of this member in its group: a member that comes back under its name finds its "
        "partitions waiting. Two members must not share one; empty joins without a name",
        metavar="NAME",
    )
    max_batch_size: int = setting(
        64, "most records handled at once", unit="records", minimum=1, maximum=100_000
    )
    max_batch_delay: float = setting(
        0.05,
        "longest wait for a batch to fill while the broker is known to have more records; a lone "
        "record is never held back",
        unit="seconds",
        minimum=0,
        maximum=10,
    )
    max_consecutive_dead_letters: int = setting(
        100,
        "refused records in a row that stop the service; 0 never stops it",
        minimum=0,
        maximum=MAX_COUNT,
    )
    max_dead_letter_share: float = setting(
        0.5,
        "share of refused records, among the last 1000 and once 200 were seen, above which the "
        "service stops; 1 never stops it",
        minimum=0,
        maximum=1,
    )

    @property
    def instance(self) -> str:
        """Which of several that do the same this is."""
        return self.group_instance_id or super().instance


def _model_cache() -> str:
    return str(Path(_cache_directory()) / "models")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What every command with a model needs."""

    model: str = setting(
        "shipped",
        "shipped (the weights that come with this package), local-dir:PATH, or hf-hub:OWNER/NAME",
        required=True,
    )
    model_revision: str = setting(
        "", "commit of the model on the hub; needed for hf-hub, so that the model never changes"
    )
    threads: int = setting(
        0, "threads the model computes with; 0 takes one for each core", minimum=0, maximum=1024
    )
    engine: str = setting(
        "torch",
        "what runs the model; all but torch need a model that `prepare-model` compiled",
        choices=("torch", "torch-compile", "onnxruntime", "openvino"),
    )
    precision: str = setting(
        "auto",
        "what the model computes with: auto is the fastest that is as accurate as fp32 on this "
        "host: int8 where the engine has it and the model comes with activation ranges, else fp32",
        choices=("auto", "fp32", "bf16", "int8"),
    )
    model_cache: str = setting(
        _model_cache, "folder of the models that `prepare-model` compiled", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class InferSettings(ModelSettings, ConsumerSettings):
    """`iot-pipeline infer`."""

    SERVICE = "iot-inference"
    SETTINGS_FILES = ("iot-inference",)
    DESCRIPTION = "Classify the images of one topic and send predictions to another."

    group_id: str = setting("iot-inference", "consumer group", required=True)
    max_image_pixels: int = setting(
        4_194_304,
        "largest image that is decoded; no edge may exceed 65535 pixels",
        unit="pixels",
        minimum=1,
        maximum=MAX_IMAGE_PIXELS,
        limit="a larger one takes more memory than its file lets expect, as an attack does",
    )


@dataclass(frozen=True, kw_only=True)
class PrepareModelSettings(ModelSettings, CommandSettings):
    """`iot-pipeline prepare-model`."""

    SERVICE = "iot-prepare-model"
    # The model is prepared for the service, with its settings.
    SETTINGS_FILES = ("iot-inference",)
    DESCRIPTION = (
        "Compile the model for its engine, once. It is compared with torch in single precision and "
        "refused (exit status 1) when its accuracy is more than half a point lower; the precision "
        "auto steps down instead. The last line begins with `made`, or with `found` where there "
        "was nothing to do."
    )

    validation_images: str = setting(
        "sample",
        "labelled images to compare on: sample, or the path of a folder or tar of class-named "
        "folders",
        required=True,
        metavar="sample|PATH",
    )
    calibration_images: str = setting(
        "",
        "training images to measure the ranges for int8 on, instead of those that come with the "
        "model: the path of a folder or tar of class-named folders",
        metavar="PATH",
    )


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """What IOT_STORE_URL says."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    """Names or addresses with their ports."""
    database: str
    collection: str
    """Empty where a database is no more than one collection."""
    tls: bool
    options: Mapping[str, str]
    """The URL's other options, which are for the database's client."""

    @property
    def name(self) -> str:
        """What is written to, without where it is."""
        return ".".join(filter(None, (self.database, self.collection)))

    @property
    def place(self) -> str:
        """The servers, as URLs have them."""
        return ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )

    def is_loopback(self) -> bool:
        """Whether nothing that is sent there leaves this host."""
        return all(_is_loopback(host) for host, _ in self.hosts)


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the URL of one kind of database looks."""

    example: str
    port: int
    tls_port: int
    has_collections: bool = False
    many_hosts: bool = False
    options: tuple[str, ...] = ()


_SCHEMES = {
    "couchdb": _Scheme("couchdb://127.0.0.1:5984/img_db", 5984, 6984),
    "mongodb": _Scheme(
        "mongodb://127.0.0.1:27017/kafka_db.image",
        27017,
        27017,
        has_collections=True,
        many_hosts=True,
        # Those of MongoDB's URI that are of use here. Left out is what would hold a secret, check
        # no certificate, or read what is not confirmed.
        options=(
            "authMechanism",
            "authSource",
            "compressors",
            "directConnection",
            "heartbeatFrequencyMS",
            "readConcernLevel",
            "replicaSet",
            "retryReads",
            "retryWrites",
            "tlsCertificateKeyFile",
            "w",
        ),
    ),
}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:/?#@,\s]+)(?::([0-9]{1,5}))?")
_STORE_NAME = re.compile(r"""[^\s/\\?#%"]+""")


def parse_store_url(url: str) -> StoreAddress:
    """Read IOT_STORE_URL.

    Raises:
        ConfigError: it holds credentials, or is no URL of a database.
    """
    if "@" in url:
        raise ConfigError(
            "IOT_STORE_URL must not hold user and password, since it is logged: set "
            "IOT_STORE_USER and IOT_STORE_PASSWORD_FILE"
        )
    name, _, rest = url.partition("://")
    scheme = _SCHEMES.get(name)
    if scheme is None:
        examples = " or ".join(known.example for known in _SCHEMES.values())
        raise ConfigError(f"IOT_STORE_URL must be a URL such as {examples}, not {url!r}")
    path, _, query = rest.partition("?")
    authority, _, path = path.partition("/")
    options = _store_options(query, ("tls", *scheme.options))
    tls = options.pop("tls", "false")
    if tls not in ("true", "false"):
        raise ConfigError(f"IOT_STORE_URL: tls must be true or false, not {tls!r}")
    hosts = _store_hosts(authority, scheme.tls_port if tls == "true" else scheme.port)
    database, dot, collection = path, "", ""
    if scheme.has_collections:
        database, dot, collection = path.partition(".")
    whole = database and bool(dot) == bool(collection) == scheme.has_collections
    if not whole or not _STORE_NAME.fullmatch(path) or (len(hosts) > 1 and not scheme.many_hosts):
        raise ConfigError(f"IOT_STORE_URL must look like {scheme.example}, not {url!r}")
    return StoreAddress(name, hosts, database, collection, tls == "true", options)


def _store_options(query: str, allowed: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        option, _, value = pair.partition("=")
        # Not the value: who knows what someone takes for an option.
        if option not in allowed:
            raise ConfigError(
                f"IOT_STORE_URL: no option {option!r} is known, only {', '.join(allowed)}"
            )
        if option in options or not value:
            raise ConfigError(f"IOT_STORE_URL: {option} needs one value")
        options[option] = unquote(value)
    return options


def _store_hosts(authority: str, default: int) -> tuple[tuple[str, int], ...]:
    hosts = []
    for entry in authority.split(","):
        match = _HOST.fullmatch(entry)
        port = int(match[2] or default) if match else 0
        if not match or not 0 < port < 65536:
            raise ConfigError(f"IOT_STORE_URL: {entry!r} is no host, nor host:port")
        hosts.append((match[1].strip("[]"), port))
    return tuple(hosts)


@dataclass(frozen=True, kw_only=True)
class DatabaseSettings(CommandSettings):
    """What every command with the database needs."""

    store_url: str = setting(
        "couchdb://127.0.0.1:5984/img_db",
        "the database, without user and password: couchdb://HOST[:PORT]/DATABASE[?tls=true], or "
        "mongodb://HOST[:PORT][,HOST:PORT…]/DATABASE.COLLECTION[?tls=true&replicaSet=…], with "
        "options of MongoDB's",
        required=True,
        metavar="URL",
    )
    store_user: str = setting("", "user of the database; empty logs in as nobody")
    store_password_file: str = setting(
        "",
        "file with the user's password; while it is changed, with both, one a line",
        metavar="FILE",
    )
    store_ca_file: str = setting(
        "",
        "PEM file of the authorities that may have signed the certificate of a database with "
        "tls=true; empty takes this host's",
        metavar="FILE",
    )
    store_timeout: float = setting(
        15.0,
        "longest wait for an answer of the database",
        unit="seconds",
        minimum=0.1,
        maximum=MAX_STORE_TIMEOUT,
        limit="a service that waits longer is taken for one that hangs, or does not stop in time",
    )

    @property
    def store_address(self) -> StoreAddress:
        """What the URL says."""
        return parse_store_url(self.store_url)

    def __post_init__(self) -> None:
        """Check the URL before anything logs it.

        Raises:
            ConfigError: it holds credentials, is no URL of a database, or would show the password.
        """
        super().__post_init__()
        address = self.store_address
        if self.store_user and not self.store_password_file:
            raise ConfigError("IOT_STORE_USER needs IOT_STORE_PASSWORD_FILE")
        if self.store_user and not address.tls and not address.is_loopback():
            # An error, not a warning: by the time that someone reads one, the network has seen it.
            raise ConfigError(
                f"IOT_STORE_URL={self.store_url} would show the password of IOT_STORE_USER, or "
                "what it can be guessed from, to the network: add tls=true to it (and "
                "IOT_STORE_CA_FILE where this host does not know the authority), or name this host"
            )
        _check_readable("store_ca_file", self.store_ca_file)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class StoreSettings(DatabaseSettings, ConsumerSettings):
    """`iot-pipeline store`."""

    SERVICE = "iot-storage"
    SETTINGS_FILES = ("iot-storage",)
    DESCRIPTION = "Write images and their predictions to a database, one document an image."

    group_id: str = setting("iot-storage", "consumer group", required=True)
    max_batch_size: int = setting(
        2000, "most records handled at once", unit="records", minimum=1, maximum=100_000
    )


@dataclass(frozen=True, kw_only=True)
class AuditSettings(DatabaseSettings, Settings):
    """`iot-pipeline audit`."""

    SERVICE = "iot-audit"
    # On the storage host the audit needs no settings of its own.
    SETTINGS_FILES = ("iot-audit", "iot-storage")
    DESCRIPTION = (
        "Compare both topics with the database: is every image that was produced predicted and "
        "stored, once? Exit status 0: yes. 1: something is missing. 69: the broker or the database "
        "does not answer."
    )

    grace: float = setting(
        60.0,
        "age below which an image counts as pending, not as missing",
        unit="seconds",
        minimum=0,
        maximum=MONTH,
    )
    since: str = setting(
        "",
        "look only at images that came since: an RFC 3339 time, or an age as 90s, 15m, 2h or 7d",
        metavar="TIME|AGE",
        flag_only=True,
    )
    expect: int = setting(
        0,
        "also fail (exit status 1) when fewer images than this were produced",
        minimum=0,
        maximum=MAX_COUNT,
        flag_only=True,
    )
    inference_group: str = setting("iot-inference", "consumer group of inference", required=True)
    storage_group: str = setting("iot-storage", "consumer group of storage", required=True)
    json: bool = setting(False, "print one JSON object on one line", flag_only=True)
    record: str = setting(
        "",
        "also leave the result, with its time, in this file as JSON",
        metavar="FILE",
        flag_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class BackupSettings(DatabaseSettings):
    """`iot-pipeline backup`."""

    SERVICE = "iot-backup"
    # It reads the database, as the audit does.
    SETTINGS_FILES = ("iot-audit", "iot-storage")
    DESCRIPTION = (
        "Write all documents of the database to a file, which appears once it is whole. Services "
        "go on meanwhile. Exit status 0: written. 69: the database does not answer. 74: the file "
        "cannot be written."
    )

    file: str = setting(
        "", "the file to write; it must not exist", required=True, metavar="FILE", positional=True
    )
    grace: float = setting(
        60.0,
        "longest wait for the other half of documents that are younger than this",
        unit="seconds",
        minimum=0,
        maximum=MONTH,
    )
    json: bool = setting(False, "print one JSON object on one line", flag_only=True)


@dataclass(frozen=True, kw_only=True)
class RestoreSettings(DatabaseSettings):
    """`iot-pipeline restore`."""

    SERVICE = "iot-restore"
    SETTINGS_FILES = ("iot-storage",)
    DESCRIPTION = (
        "Merge the documents of a backup into the database. Services go on meanwhile, and doing it "
        "again changes nothing. A damaged file is refused before anything is written. Exit status "
        "0: all is there. 1: something is not, or was refused. 65: the file is damaged. 69: the "
        "database does not answer."
    )

    file: str = setting("", "the backup", required=True, metavar="FILE", positional=True)
    check: bool = setting(False, "only read the file and tell whether it is whole", flag_only=True)
    compare: bool = setting(
        False,
        "only compare the file with the database, document by document, and write nothing",
        flag_only=True,
    )
    json: bool = setting(False, "print one JSON object on one line", flag_only=True)

    def __post_init__(self) -> None:
        """Check that it is said which.

        Raises:
            UsageError: it is not.
        """
        super().__post_init__()
        if self.check and self.compare:
            raise UsageError("--check looks at the file alone, --compare at the database too")


@dataclass(frozen=True, kw_only=True)
class DeadLetterSettings(Settings):
    """What every `iot-pipeline dead-letters` needs: which of them."""

    SERVICE = "iot-operator"
    SETTINGS_FILES = ("iot-operator",)

    which: str = setting(
        "",
        "a dead letter's position (partition:offset, as `list` shows it), or its record's key, "
        "which is the image's id; several of them; or none, for all that the options below leave",
        metavar="POSITION|ID",
        positional=True,
    )
    reason: str = setting(
        "",
        "only those refused for this reason, or one of several",
        metavar="REASON[,REASON…]",
        flag_only=True,
    )
    stage: str = setting(
        "", "only those of this service, such as iot-inference", metavar="NAME", flag_only=True
    )
    since: str = setting(
        "",
        "only those refused since: an RFC 3339 time, or an age such as 90s, 15m, 2h or 7d",
        metavar="TIME|AGE",
        flag_only=True,
    )
    until: str = setting(
        "", "only those refused before, written as --since", metavar="TIME|AGE", flag_only=True
    )


@dataclass(frozen=True, kw_only=True)
class ListDeadLettersSettings(DeadLetterSettings):
    """`iot-pipeline dead-letters list`."""

    DESCRIPTION = (
        "List dead letters that are open: neither replayed nor dropped. Exit status 0: listed. 1: "
        "one that was named is not there. 69: the broker does not answer."
    )

    all: bool = setting(False, "also those that were replayed or dropped", flag_only=True)
    json: bool = setting(
        False, "print one JSON object a dead letter, each on one line", flag_only=True
    )


@dataclass(frozen=True, kw_only=True)
class ShowDeadLettersSettings(ListDeadLettersSettings):
    """`iot-pipeline dead-letters show`."""

    DESCRIPTION = (
        "Show all that is known of open dead letters, and how their values begin; with --json, the "
        "whole values in base64. Exit status 0: shown. 1: there is none, or one that was named is "
        "not there. 69: the broker does not answer."
    )


@dataclass(frozen=True, kw_only=True)
class DropDeadLettersSettings(DeadLetterSettings):
    """`iot-pipeline dead-letters drop`."""

    DESCRIPTION = (
        "Be done with open dead letters without replaying them. Their bytes stay until Kafka's "
        "retention ends. Shows which, and asks. Exit status 0: done. 1: not, or not all. 69: the "
        "broker does not answer; what is left is still open, do it again."
    )

    dry_run: bool = setting(False, "only show which", flag_only=True)
    yes: bool = setting(False, "do not ask", flag_only=True)


@dataclass(frozen=True, kw_only=True)
class ReplayDeadLettersSettings(DropDeadLettersSettings):
    """`iot-pipeline dead-letters replay`."""

    DESCRIPTION = (
        "Send the records of open dead letters, keys and bytes untouched, back to the topics they "
        "came from. What is refused again comes back as a new dead letter. Shows which, and asks. "
        "Exit status 0: done. 1: not, or not all. 69: the broker does not answer; what is left is "
        "still open, do it again."
    )

    all: bool = setting(False, "also those that were replayed or dropped", flag_only=True)


SettingsT = TypeVar("SettingsT", bound=CommandSettings)


def environment_name(name: str) -> str:
    """`max_batch_size` -> `IOT_MAX_BATCH_SIZE`."""
    return f"IOT_{name.upper()}"


def flag_name(name: str) -> str:
    """`max_batch_size` -> `--max-batch-size`."""
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser, kind: type[CommandSettings]) -> None:
    """Add a flag for each setting of `kind` and `--env-file`."""
    parser.add_argument(
        "--env-file",
        metavar="FILE",
        help="settings file of NAME=value lines (environment: IOT_ENV_FILE; default: "
        + ", else ".join(f"{SETTINGS_DIRECTORY}/{name}.env" for name in kind.SETTINGS_FILES)
        + ", where it exists)",
    )
    types = get_type_hints(kind)
    for declared in fields(kind):
        about = declared.metadata
        if about["positional"]:
            metavar = about["metavar"] or "|".join(about["choices"])
            nargs = None if about["required"] else "*"
            parser.add_argument(declared.name, metavar=metavar, nargs=nargs, help=about["help"])
            continue
        text = f"{about['help']}{' [' + about['unit'] + ']' if about['unit'] else ''}"
        variable = "" if about["flag_only"] else f"{environment_name(declared.name)}; "
        text = f"{text} ({variable}default: {_default_text(declared)})"
        text = text.replace("%", "%%")
        if types[declared.name] is bool:
            parser.add_argument(
                flag_name(declared.name),
                action=argparse.BooleanOptionalAction,
                default=None,
                help=text,
            )
        else:
            metavar = about["metavar"] or "|".join(about["choices"])
            metavar = metavar or ("N" if types[declared.name] in (int, float) else "TEXT")
            parser.add_argument(flag_name(declared.name), metavar=metavar, help=text)


def _default_text(declared: Field[Any]) -> str:
    if declared.default_factory is not MISSING:
        if declared.default_factory is socket.gethostname:
            return "this host's name"
        return str(declared.default_factory())
    if declared.default is False:
        return "no"
    return "none" if declared.default == "" else str(declared.default)


def load(
    kind: type[SettingsT],
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> SettingsT:
    """Gather the settings of `kind`.

    Args:
        kind: a class of settings.
        flags: values by setting name (and `env_file`) as argparse leaves them; None: not given.
        environment: environment variables, this process's by default.

    Raises:
        ConfigError: a value cannot be used, or a settings file that was named cannot be read.
        UsageError: a value that only a flag can give cannot be used.
    """
    flags = flags or {}
    environment = os.environ if environment is None else environment
    file, from_file = _settings_file(kind, flags.get("env_file"), environment)
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for declared in fields(kind):
        name, variable = declared.name, environment_name(declared.name)
        if flags.get(name) is not None:
            raw, origin = flags[name], flag_name(name)
        elif declared.metadata["flag_only"]:
            continue
        elif variable in environment:
            raw, origin = environment[variable], variable
        elif variable in from_file:
            raw, origin = from_file[variable], f"{variable} in {file}"
        else:
            continue
        try:
            values[name] = _parse(declared.metadata, types[name], raw, origin)
        except ConfigError as error:
            if declared.metadata["flag_only"]:
                raise UsageError(str(error)) from error
            raise
    return kind(**values)


def _parse(about: Mapping[str, Any], type_: type, raw: Any, origin: str) -> Any:
    if isinstance(raw, bool):
        return raw
    text = " ".join(raw) if isinstance(raw, list) else str(raw).strip()
    if type_ is bool:
        if text.lower() not in _BOOLEANS:
            raise ConfigError(f"{origin} must be true or false, not {text!r}")
        return _BOOLEANS[text.lower()]
    if type_ in (int, float):
        return _parse_number(about, type_, text, origin)
    if about["choices"] and text not in about["choices"]:
        raise ConfigError(f"{origin} must be one of {', '.join(about['choices'])}, not {text!r}")
    if about["required"] and not text:
        raise ConfigError(f"{origin} must not be empty: {about['help']}")
    return text


def _parse_number(about: Mapping[str, Any], type_: type, text: str, origin: str) -> int | float:
    low = -math.inf if about["minimum"] is None else about["minimum"]
    high = math.inf if about["maximum"] is None else about["maximum"]
    try:
        value: int | float = type_(text)
    except ValueError:
        value = math.nan
    if low <= value <= high and abs(value) != math.inf:
        return value
    needed = "a whole number" if type_ is int else "a number"
    needed += f" of {about['unit']}" if about["unit"] else ""
    needed += f", at least {low}" if math.isfinite(low) else ""
    needed += f", at most {high}" if math.isfinite(high) else ""
    why = f": {about['limit']}" if about["limit"] and value > high else ""
    raise ConfigError(f"{origin} must be {needed}, not {text!r}{why}")


def _settings_file(
    kind: type[CommandSettings], flag: str | None, environment: Mapping[str, str]
) -> tuple[Path | None, dict[str, str]]:
    named = flag or environment.get("IOT_ENV_FILE")
    if named:
        path = Path(named)
        try:
            return path, read_env_file(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"settings file {path} (--env-file, IOT_ENV_FILE): {error}"
            ) from error
    for service in kind.SETTINGS_FILES:
        path = SETTINGS_DIRECTORY / f"{service}.env"
        try:
            return path, read_env_file(path)
        except FileNotFoundError:
            continue
        except PermissionError:
            # systemd hands a unit these settings in its environment; a person has to be told.
            if "INVOCATION_ID" not in environment:
                sys.stderr.write(
                    f"iot-pipeline: {path} is not readable for you, so its settings are not used; "
                    "run as root (sudo) to use them\n"
                )
            return None, {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings file {path}: {error}") from error
    return None, {}


def describe(settings: CommandSettings) -> dict[str, Any]:
    """The settings in effect, for the log. No setting holds a secret: passwords are in files."""
    return {declared.name: getattr(settings, declared.name) for declared in fields(settings)}


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, its settings, and the module whose `run(settings)` does the work.

    A name of two words is an action of a group of commands; see `GROUPS`.
    """

    name: str
    settings: type[CommandSettings]
    module: str

    def load(self, flags: Mapping[str, Any]) -> CommandSettings:
        """The command's settings; see `load`."""
        return load(self.settings, flags)


COMMANDS: tuple[Command, ...] = (
    Command("produce", ProduceSettings, "iot_pipeline.produce"),
    Command("infer", InferSettings, "iot_pipeline.infer"),
    Command("prepare-model", PrepareModelSettings, "iot_pipeline.prepare"),
    Command("store", StoreSettings, "iot_pipeline.store"),
    Command("audit", AuditSettings, "iot_pipeline.audit"),
    Command("backup", BackupSettings, "iot_pipeline.backup"),
    Command("restore", RestoreSettings, "iot_pipeline.restore"),
    Command("dead-letters list", ListDeadLettersSettings, "iot_pipeline.letters"),
    Command("dead-letters show", ShowDeadLettersSettings, "iot_pipeline.letters"),
    Command("dead-letters replay", ReplayDeadLettersSettings, "iot_pipeline.replay"),
    Command("dead-letters drop", DropDeadLettersSettings, "iot_pipeline.replay"),
)

GROUPS = {
    "dead-letters": "Look at the records that could not be handled, and send them again or not",
}
