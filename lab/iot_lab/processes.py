"""The pipeline as plain processes on loopback: no hosts, no root.

The broker is the real Kafka of the lab's archive, the database one of the lab's stand-ins, the apps
are the installed console script. `make demo` and the integration tests run on these::

    with Broker(folder) as broker, CouchDB(folder) as database:
        with Pipeline(folder, broker, database) as pipeline:
            pipeline.store().start().wait_ready()
            ...

Everything listens on 127.0.0.1 alone, on ports that were free, logs to `<folder>/<name>.log`, and
dies with the process that started it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.errors import KafkaError

from iot_lab import paths
from iot_lab.artifacts import couchdb_archive, kafka_archive, mongodb_archive
from iot_pipeline.schema import STORED_AT

APPS = paths.APPS / "bin"
LOOPBACK = "127.0.0.1"
PARTITIONS = 4  # of the image and the prediction topic: both are keyed by image id
MAX_RECORD_BYTES = 1_000_000
TOPIC_CONFIG = {"message.timestamp.type": "LogAppendTime"}  # as on hosts: kafka_resources_topics
READY_TIMEOUT = 90.0  # seconds; a busy machine loads torch slowly
STOP_TIMEOUT = 30.0  # seconds from SIGTERM to SIGKILL
TAIL_LINES = 20

QUICK_JAVA = {
    "KAFKA_HEAP_OPTS": "-Xmx512m -Xms128m",
    # Compiling thoroughly pays off after minutes; here a quick start counts.
    "KAFKA_JVM_PERFORMANCE_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}
LASTING_JAVA = {"KAFKA_HEAP_OPTS": "-Xmx512m -Xms512m"}
"""As on hosts: Kafka's own options, and a heap of one size."""

_socket_numbers = itertools.count()


class ProcessError(Exception):
    """A process did not do what it should; the message shows the end of its log."""


def free_port() -> int:
    """A TCP port on loopback that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(
    check: Callable[[], object], what: str, timeout: float = READY_TIMEOUT, pause: float = 0.1
) -> None:
    """Wait until `check` is true, asking every `pause` seconds.

    Raises:
        TimeoutError: it did not become true within `timeout` seconds; the message names `what`.
    """
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(pause)


class Process:
    """One program in the background, with its output in a log file.

    It can be stopped or killed and started again, on the same ports and data.
    """

    def __init__(
        self, name: str, folder: Path, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process and self.running else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start it, without waiting until it is ready."""
        if self.running:
            raise ProcessError(f"{self.name} runs already")
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a session of its own it hears no Ctrl-C, so that we can stop things in order. Should we
        # be killed, the kernel ends it in our place.
        command = ["setpriv", "--pdeathsig", "TERM", "--", *self._command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_clean_environment() | self._environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return self

    def is_ready(self) -> bool:
        """Whether it does its work."""
        return self.running

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> Self:
        """Wait until it does its work.

        Raises:
            ProcessError: it ended, or is not ready after `timeout` seconds.
        """

        def settled() -> bool:
            if not self.running:
                raise self.error(f"ended with status {self.status()} before it was ready")
            return self.is_ready()

        try:
            wait_for(settled, f"{self.name} to be ready", timeout)
        except TimeoutError as error:
            raise self.error(str(error)) from error
        return self

    def status(self) -> int | None:
        """The exit status once it has ended; a signal's number is negative."""
        return self._process.poll() if self._process else None

    def wait(self, timeout: float) -> int:
        """Wait until it ends by itself and return its exit status.

        Raises:
            ProcessError: it still runs after `timeout` seconds.
        """
        if self._process is None:
            raise ProcessError(f"{self.name} was never started")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise self.error(f"still runs after {timeout:.0f} s") from error

    def stop(self, timeout: float = STOP_TIMEOUT) -> int | None:
        """End it with SIGTERM, or SIGKILL if that is not heard, and return its exit status."""
        if self._process is None:
            return None
        if self.running:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self.error(f"did not end within {timeout:.0f} s of SIGTERM") from None

    def kill(self) -> None:
        """End it with SIGKILL: what power loss does."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Give back what is held beside the process. It cannot be started again."""

    def output(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def error(self, problem: str) -> ProcessError:
        """An error that shows the end of the log."""
        tail = "\n".join(f"  {line}" for line in self.output().splitlines()[-TAIL_LINES:])
        return ProcessError(f"{self.name} {problem}; the end of {self.log}:\n{tail}")

    def __enter__(self) -> Self:
        try:
            return self.start().wait_ready()
        except BaseException:
            self.kill()
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self.close()


def _clean_environment() -> dict[str, str]:
    """Ours, without settings that are meant for other pipelines or our own service manager."""
    services = ("IOT_", "KAFKA_", "COUCHDB_", "MONGODB_")
    foreign = (*services, "PYTHON", "NOTIFY_SOCKET", "WATCHDOG_", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _unpacked(archive: Path) -> Path:
    """The single top folder of an archive, unpacked once as long as the archive is the same."""
    checksum = next(archive.parent.glob(f"{archive.name}.sha*")).read_text().strip()
    home = paths.CACHE / "unpacked" / f"{archive.stem}-{checksum[:12]}"
    if not home.is_dir():
        partial = home.with_name(f"{home.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run(["tar", "-xf", str(archive), "-C", str(partial)], check=True)
        with contextlib.suppress(OSError):  # another process was quicker
            partial.rename(home)
        shutil.rmtree(partial, ignore_errors=True)
    return next(home.iterdir())


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ProcessError(f"there is no {name}: install {package}, or run lab/bin/lab setup demo")
    return path


class Broker(Process):
    """A Kafka node that is broker and controller in one."""

    def __init__(self, folder: Path, java: Mapping[str, str] = QUICK_JAVA) -> None:
        _program("java", "default-jre-headless")
        self.home = _unpacked(kafka_archive())
        self._port, self._controller_port = free_port(), free_port()
        self._settings = folder / "server.properties"
        super().__init__(
            "kafka",
            folder,
            [str(self.home / "bin" / "kafka-server-start.sh"), str(self._settings)],
            {"LOG_DIR": str(folder / "kafka-logs"), **java},
        )

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect to."""
        return f"{LOOPBACK}:{self._port}"

    def start(self) -> Self:
        """Start it, formatting its storage the first time."""
        if not self._settings.exists():
            self._format()
        return super().start()

    def client(self, user: str = "") -> dict[str, Any]:
        """What kafka-python's clients need to connect as `user`; by default as an administrator."""
        del user  # everybody may do everything here
        return {"bootstrap_servers": self.bootstrap_servers}

    def environment(self, user: str) -> dict[str, str]:
        """The settings with which an app connects as `user`."""
        del user
        return {"IOT_BOOTSTRAP_SERVERS": self.bootstrap_servers}

    def _properties(self) -> dict[str, str]:
        """What server.properties says."""
        controller = f"{LOOPBACK}:{self._controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.bootstrap.servers": controller,
            "listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self.folder / "kafka-data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            # Nobody waits here for other members of a group, nor for other brokers: one that was
            # killed may come back as soon as its session has run out.
            "group.initial.rebalance.delay.ms": "0",
            "broker.session.timeout.ms": "4000",
            "broker.heartbeat.interval.ms": "500",
        }

    def _format_arguments(self) -> list[str]:
        """What Kafka's storage is formatted with, beside its settings."""
        cluster = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        # In one word: the id may begin with a minus.
        return ["--standalone", f"--cluster-id={cluster}"]

    def _format(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._settings.touch(mode=0o600)
        self._settings.write_text(
            "".join(f"{name}={value}\n" for name, value in self._properties().items())
        )
        # From a file, one to a line: everybody on the machine sees a command's own arguments.
        arguments = self.folder / "format.arguments"
        arguments.touch(mode=0o600)
        arguments.write_text(
            "\n".join(["format", "--config", str(self._settings), *self._format_arguments()])
        )
        done = subprocess.run(
            [str(self.home / "bin" / "kafka-storage.sh"), f"@{arguments}"],
            env=_clean_environment() | self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        arguments.unlink()
        if done.returncode:
            self._settings.unlink()
            raise ProcessError(f"cannot format Kafka's storage: {done.stdout}{done.stderr}")

    def is_ready(self) -> bool:
        """Whether clients find a broker that is not fenced."""
        # A client that finds nobody is slow to say so: knock first.
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, self._port)):
                return False
        try:
            with self.admin() as admin:
                return bool(admin.describe_cluster()["brokers"])
        except KafkaError:
            return False

    @contextlib.contextmanager
    def admin(self) -> Iterator[Any]:
        """An admin client, closed afterwards."""
        client = KafkaAdminClient(**self.client())
        try:
            yield client
        finally:
            client.close()

    def committed(self, group: str) -> dict[TopicPartition, int]:
        """The offsets a consumer group has committed, by partition."""
        with self.admin() as admin:
            return {
                at: found.offset for at, found in admin.list_group_offsets(group)[group].items()
            }

    def members(self, group: str) -> set[str]:
        """The ids of a consumer group's members. A member that leaves and returns has a new one."""
        with self.admin() as admin:
            return {
                member["member_id"] for member in admin.describe_groups([group])[group]["members"]
            }

    def ends(self, topic: str) -> dict[TopicPartition, int]:
        """Where each partition of a topic ends."""
        with self._consumer(topic) as consumer:
            ends: dict[TopicPartition, int] = consumer.end_offsets(consumer.assignment())
            return ends

    def records(self, topic: str) -> list[Any]:
        """All records of a topic, by partition and offset."""
        with self._consumer(topic) as consumer:
            records: list[Any] = []
            ends = consumer.end_offsets(consumer.assignment())
            while any(consumer.position(at) < end for at, end in ends.items()):
                for batch in consumer.poll(timeout_ms=200).values():
                    records += batch
        return sorted(records, key=lambda record: (record.partition, record.offset))

    def send(self, topic: str, value: bytes | None, key: bytes | None = None) -> Any:
        """Send one record as it is and return where it lies: its partition and offset.

        Raises:
            KafkaError: the broker does not take it.
        """
        producer = KafkaProducer(**self.client(), acks="all")
        try:
            return producer.send(topic, value=value, key=key).get(timeout=30)
        finally:
            producer.close()

    @contextlib.contextmanager
    def _consumer(self, topic: str) -> Iterator[Any]:
        consumer = KafkaConsumer(
            **self.client(),
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        try:
            partitions = consumer.partitions_for_topic(topic) or set()
            consumer.assign([TopicPartition(topic, partition) for partition in partitions])
            yield consumer
        finally:
            consumer.close()

    def create_topics(
        self, topics: Mapping[str, tuple[int, int]], config: Mapping[str, str] = TOPIC_CONFIG
    ) -> None:
        """Make topics from their name, partitions and largest record in bytes."""
        new = [
            NewTopic(
                name=name,
                num_partitions=partitions,
                replication_factor=1,
                topic_configs={**config, "max.message.bytes": str(largest)},
            )
            for name, (partitions, largest) in topics.items()
        ]
        with self.admin() as admin:
            admin.create_topics(new)
            admin.wait_for_topics(list(topics))


Documents = dict[str, dict[str, Any]]
"""Stored documents by id."""


class Database(Process):
    """A database server of plain documents, whose databases (or collections) are told by name."""

    @abstractmethod
    def create(self, name: str) -> None:
        """Make a database that the apps may read and write.

        Raises:
            ProcessError: the server refuses.
        """

    @abstractmethod
    def drop(self, name: str) -> None:
        """Remove a database.

        Raises:
            ProcessError: the server refuses.
        """

    @abstractmethod
    def environment(self, name: str) -> dict[str, str]:
        """The settings with which an app uses a database made here."""

    @abstractmethod
    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a document as someone who is no app of ours.

        Raises:
            ProcessError: the server refuses.
        """

    @abstractmethod
    def documents(self, name: str, keys: Sequence[str] | None = None) -> Documents:
        """The documents of a database by id; all, or those of some ids."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the database answered."""

    status: int
    body: Any


class CouchDB(Database):
    """The CouchDB stand-in, with an admin and one user who may use the databases made here."""

    USER = "iot-storage"

    def __init__(self, folder: Path) -> None:
        home = _unpacked(couchdb_archive())
        self._port = free_port()
        self._admin = ("admin", secrets.token_urlsafe(24))
        self._user = (self.USER, secrets.token_urlsafe(24))
        self._admin_file = folder / "couchdb-admin.password"
        self.password_file = folder / "couchdb.password"
        super().__init__(
            "couchdb",
            folder,
            [_program("node", "nodejs"), str(home / "server.js")],
            {
                "COUCHDB_DATA_DIR": str(folder / "couchdb-data"),
                "COUCHDB_ADMIN_PASSWORD_FILE": str(self._admin_file),
                "COUCHDB_BIND_ADDRESS": LOOPBACK,
                "COUCHDB_PORT": str(self._port),
            },
        )

    @property
    def url(self) -> str:
        """The server's address, without credentials."""
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def admin(self) -> tuple[str, str]:
        """Name and password of the server's admin."""
        return self._admin

    @property
    def user(self) -> tuple[str, str]:
        """Name and password of the databases' user."""
        return self._user

    def start(self) -> Self:
        """Start it, writing its passwords into files only we can read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, (_, password) in (
            (self._admin_file, self._admin),
            (self.password_file, self._user),
        ):
            file.touch(mode=0o600)
            file.write_text(password)
        return super().start()

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return self.request("GET", "/_up", user=None).status == 200
        except OSError:
            return False

    def request(
        self,
        method: str,
        path: str,
        document: object = None,
        user: tuple[str, str] | None = ("", ""),
    ) -> Answer:
        """Send one request; as the admin, or as `user`, or anonymously when that is None.

        Raises:
            OSError: there is no answer.
        """
        headers = {"Accept": "application/json"}
        if user is not None:
            credentials = ":".join(self._admin if user == ("", "") else user)
            headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
        body = None
        if document is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(document)
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, json.loads(response.read() or b"null"))
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def create(self, name: str) -> None:
        """Make a database that the user may read and write.

        Raises:
            ProcessError: the server refuses.
        """
        account, password = self._user
        members = {"names": [account], "roles": []}
        admins = {"names": [], "roles": ["_admin"]}
        person = {"name": account, "password": password, "roles": [], "type": "user"}
        for path, document in (
            ("/_users", None),
            (f"/_users/org.couchdb.user:{account}", person),
            (f"/{name}", None),
            (f"/{name}/_security", {"admins": admins, "members": members}),
        ):
            answer = self.request("PUT", path, document)
            # 409 and 412: it is there from an earlier call.
            if answer.status not in (200, 201, 202, 409, 412):
                raise self.error(f"answered PUT {path} with {answer.status} {answer.body}")

    def drop(self, name: str) -> None:
        """Remove a database.

        Raises:
            ProcessError: the server refuses.
        """
        answer = self.request("DELETE", f"/{name}")
        if answer.status != 200:
            raise self.error(f"answered DELETE /{name} with {answer.status} {answer.body}")

    def environment(self, name: str) -> dict[str, str]:
        """The settings with which an app uses a database made here."""
        return {
            "IOT_STORE_URL": f"couchdb://{LOOPBACK}:{self._port}/{name}",
            "IOT_STORE_USER": self.USER,
            "IOT_STORE_PASSWORD_FILE": str(self.password_file),
        }

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a document as someone who is no app of ours.

        Raises:
            ProcessError: the server refuses.
        """
        answer = self.request("PUT", f"/{name}/{document['_id']}", dict(document))
        if answer.status not in (201, 202):
            raise self.error(f"answered PUT {document['_id']} with {answer.status} {answer.body}")

    def documents(self, name: str, keys: Sequence[str] | None = None) -> Documents:
        """The documents of a database by id; all, or those of some ids."""
        path = f"/{name}/_all_docs?include_docs=true"
        if keys is None:
            answer = self.request("GET", path)
        else:
            answer = self.request("POST", path, {"keys": list(keys)})
        return {row["id"]: row["doc"] for row in answer.body["rows"] if row.get("doc")}


class MongoDB(Database):
    """The MongoDB stand-in. It knows no users."""

    DATABASE = "kafka_db"

    def __init__(self, folder: Path, tls: Mapping[str, str] | None = None) -> None:
        _program("java", "default-jre-headless")
        home = _unpacked(mongodb_archive())
        self._port = free_port()
        super().__init__(
            "mongodb",
            folder,
            [str(home / "bin" / "mongodb-standin")],
            {
                "MONGODB_DATA_DIR": str(folder / "mongodb-data"),
                "MONGODB_BIND_ADDRESS": LOOPBACK,
                "MONGODB_PORT": str(self._port),
                "MONGODB_JAVA_OPTS": "-Xmx512m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
                **(tls or {}),
            },
        )

    @property
    def place(self) -> str:
        """The server as URLs have it."""
        return f"{LOOPBACK}:{self._port}"

    def is_ready(self) -> bool:
        """Whether it listens, which it does once it has opened its documents."""
        with socket.socket() as probe:
            return not probe.connect_ex((LOOPBACK, self._port))

    @contextlib.contextmanager
    def collection(self, name: str) -> Iterator[Any]:
        """PyMongo's collection, whose client is closed afterwards."""
        from pymongo import MongoClient

        client: MongoClient[dict[str, Any]] = MongoClient(LOOPBACK, self._port, tz_aware=True)
        with client:
            yield client[self.DATABASE][name]

    def create(self, name: str) -> None:
        """Nothing to do: the first document makes its collection."""

    def drop(self, name: str) -> None:
        """Remove a collection."""
        with self.collection(name) as collection:
            collection.drop()

    def environment(self, name: str) -> dict[str, str]:
        """The settings with which an app uses a collection."""
        return {"IOT_STORE_URL": f"mongodb://{self.place}/{self.DATABASE}.{name}"}

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a document as someone who is no app of ours."""
        with self.collection(name) as collection:
            collection.insert_one(dict(document))

    def documents(self, name: str, keys: Sequence[str] | None = None) -> Documents:
        """The documents of a collection by id; all, or those of some ids."""
        with self.collection(name) as collection:
            found = collection.find({} if keys is None else {"_id": {"$in": list(keys)}})
            return {document["_id"]: document for document in found}


class App(Process):
    """`iot-pipeline COMMAND` as a service, ready when it tells its service manager so."""

    def __init__(
        self,
        name: str,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        # An abstract address needs no file and no folder of a bearable length.
        self._address = f"@iot-lab-{os.getpid()}-{next(_socket_numbers)}"
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.bind(self._address.replace("@", "\0", 1))
        self._notifications.setblocking(False)
        self._ready = False
        super().__init__(
            name,
            folder,
            [str(APPS / "iot-pipeline"), *command],
            {**environment, "NOTIFY_SOCKET": self._address},
        )

    def start(self) -> Self:
        """Start it, without waiting until it is ready."""
        if not (APPS / "iot-pipeline").exists():
            raise ProcessError(f"{APPS / 'iot-pipeline'} is missing: run lab/bin/lab setup demo")
        self._read_notifications()  # of the process before
        self._ready = False
        return super().start()

    def is_ready(self) -> bool:
        """Whether it has sent READY=1 since it was started."""
        self._ready = "READY=1" in self._read_notifications() or self._ready
        return self._ready

    def close(self) -> None:
        """Give back the socket. It cannot be started again."""
        self._notifications.close()

    def _read_notifications(self) -> list[str]:
        lines: list[str] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines += self._notifications.recv(65536).decode().splitlines()
        return lines


class Pipeline:
    """Topics, a database and apps, on a broker and a database server.

    With prefixes of their own, several can share the servers.
    """

    def __init__(self, folder: Path, broker: Broker, database: Database, prefix: str = "") -> None:
        self.folder = folder
        self.broker = broker
        self.database = database
        self.prefix = prefix
        self.image_topic = f"{prefix}iot-topic"
        self.prediction_topic = f"{prefix}iot-predictions"
        self.dead_letter_topic = f"{prefix}iot-dead-letter"
        self.database_name = f"{prefix}img_db"
        self._apps: list[App] = []

    def prepare(self) -> None:
        """Make the topics and the database."""
        self.broker.create_topics(
            {
                self.image_topic: (PARTITIONS, MAX_RECORD_BYTES + 100_000),
                self.prediction_topic: (PARTITIONS, MAX_RECORD_BYTES),
                # Room for the original record and the reason beside it.
                self.dead_letter_topic: (1, MAX_RECORD_BYTES + 200_000),
            }
        )
        self.database.create(self.database_name)

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop every app, in the order in which images flow."""
        order = ("produce", "infer", "store")
        for app in sorted(self._apps, key=lambda app: order.index(app.name.split("-")[0])):
            try:
                app.stop()
            finally:
                app.kill()
                app.close()
        self._apps.clear()

    @property
    def environment(self) -> dict[str, str]:
        """The settings that all commands share."""
        return {
            # Services of this machine, if it runs any, have settings of their own.
            "IOT_ENV_FILE": os.devnull,
            "IOT_BOOTSTRAP_SERVERS": self.broker.bootstrap_servers,
            "IOT_IMAGE_TOPIC": self.image_topic,
            "IOT_PREDICTION_TOPIC": self.prediction_topic,
            "IOT_DEAD_LETTER_TOPIC": self.dead_letter_topic,
            "IOT_MAX_RECORD_BYTES": str(MAX_RECORD_BYTES),
            "IOT_CACHE_DIR": str(self.folder),
            "IOT_INFERENCE_GROUP": f"{self.prefix}iot-inference",
            "IOT_STORAGE_GROUP": f"{self.prefix}iot-storage",
        }

    @property
    def database_environment(self) -> dict[str, str]:
        """The settings of the commands that use the database, too."""
        return {
            **self.environment,
            **self.database.environment(self.database_name),
        }

    def produce(self, *flags: str) -> App:
        """The producer, not started; flags are those of `iot-pipeline produce`."""
        environment = self._environment_of("iot-producer") | {"IOT_INTERVAL": "1"}
        return self._app("produce", environment, flags)

    def infer(self, *flags: str) -> App:
        """An inference worker, not started. Several share the work."""
        environment = {
            **self._environment_of("iot-inference"),
            "IOT_GROUP_ID": self.environment["IOT_INFERENCE_GROUP"],
            # Waiting threads that spin take the processor from everything else on the machine.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return self._app("infer", environment, flags)

    def store(self, *flags: str) -> App:
        """A storage worker, not started."""
        environment = {
            **self.database_environment,
            **self._environment_of("iot-storage"),
            "IOT_GROUP_ID": self.environment["IOT_STORAGE_GROUP"],
        }
        return self._app("store", environment, flags)

    def _environment_of(self, user: str) -> dict[str, str]:
        """The settings that all commands share, for the one that connects as `user`."""
        return self.environment | self.broker.environment(user)

    def _app(self, command: str, environment: Mapping[str, str], flags: Sequence[str]) -> App:
        number = sum(app.name.split("-")[0] == command for app in self._apps) + 1
        name = command if number == 1 else f"{command}-{number}"
        names_itself = {"IOT_GROUP_INSTANCE_ID": f"{self.prefix}{name}"}
        app = App(name, self.folder, [command, *flags], {**environment, **names_itself})
        self._apps.append(app)
        return app

    def documents(self) -> Documents:
        """The database's documents by id."""
        return self.database.documents(self.database_name)

    def produced(self) -> int:
        """How many records of images the topic has been given."""
        return sum(self.broker.ends(self.image_topic).values())

    def complete(self) -> int:
        """How many documents hold an image and its prediction."""
        return sum(STORED_AT in document for document in self.documents().values())

    def tool_environment(self, user: str) -> dict[str, str]:
        """The environment of a command that ends by itself, for the one that connects as `user`."""
        return _clean_environment() | self.database_environment | self._environment_of(user)

    def run(self, *words: str, user: str = "iot-audit") -> subprocess.CompletedProcess[str]:
        """Run a command that ends by itself, such as the audit, and return what it printed."""
        return subprocess.run(
            [str(APPS / "iot-pipeline"), *words],
            env=self.tool_environment(user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def dead_letters(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `iot-pipeline dead-letters` as the one who may."""
        return self.run("dead-letters", *words, user="iot-operator")

    def audit(self, *flags: str) -> tuple[int, dict[str, Any]]:
        """Run the audit; returns its exit status and what it found.

        Raises:
            ProcessError: it gave no answer.
        """
        done = self.run("audit", "--json", *flags)
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError as error:
            problem = f"the audit ended with {done.returncode}: {done.stdout}{done.stderr}"
            raise ProcessError(problem) from error
        return done.returncode, found
