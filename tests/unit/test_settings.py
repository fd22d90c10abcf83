"""Settings: flag over environment over file over default, and errors that say what to set."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from iot_pipeline import audit, cli, settings, worker
from iot_pipeline.errors import ConfigError, Exit, UsageError
from iot_pipeline.settings import (
    COMMANDS,
    AuditSettings,
    BackupSettings,
    CommandSettings,
    InferSettings,
    ListDeadLettersSettings,
    ProduceSettings,
    StoreSettings,
    describe,
    environment_name,
    load,
)


@pytest.fixture(autouse=True)
def no_settings_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings, "SETTINGS_DIRECTORY", tmp_path)
    return tmp_path


def test_defaults() -> None:
    loaded = load(InferSettings, environment={})
    assert loaded.bootstrap_servers == "localhost:9092"
    assert loaded.max_batch_size == 64
    assert loaded.group_id == "iot-inference"
    assert loaded.group_instance_id == socket.gethostname()
    assert load(StoreSettings, environment={}).max_batch_size == 2000
    assert load(ProduceSettings, environment={}).interval == 10


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.env"
    file.write_text('IOT_GROUP_ID="file"\nIOT_IMAGE_TOPIC=file\nIOT_MODEL=file\nUNKNOWN=1\n')
    environment = {"IOT_ENV_FILE": str(file), "IOT_GROUP_ID": "env", "IOT_IMAGE_TOPIC": "env"}
    loaded = load(InferSettings, {"group_id": "flag", "image_topic": None}, environment)
    assert (loaded.group_id, loaded.image_topic, loaded.model) == ("flag", "env", "file")
    assert loaded.prediction_topic == "iot-predictions"


def test_the_service_s_own_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "iot-storage.env").write_text("IOT_STORE_URL=couchdb://db/other\n")
    assert load(StoreSettings, environment={}).store_address.name == "other"
    assert load(InferSettings, environment={}).model == "shipped"


def test_the_audit_uses_the_store_s_file_unless_it_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "iot-storage.env").write_text("IOT_STORE_USER=store\nIOT_STORE_PASSWORD_FILE=/p\n")
    assert load(AuditSettings, environment={}).store_user == "store"
    (tmp_path / "iot-audit.env").write_text("IOT_STORE_USER=audit\nIOT_STORE_PASSWORD_FILE=/p\n")
    assert load(AuditSettings, environment={}).store_user == "audit"


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="IOT_ENV_FILE"):
        load(StoreSettings, {"env_file": str(tmp_path / "none.env")}, {})


def test_a_file_of_the_service_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert load(StoreSettings, environment={}).store_address.name == "img_db"
    assert "sudo" in capsys.readouterr().err
    load(StoreSettings, environment={"INVOCATION_ID": "by systemd"})
    assert capsys.readouterr().err == ""
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("IOT_MAX_BATCH_SIZE", "0", "whole number of records, at least 1"),
        ("IOT_MAX_BATCH_SIZE", "many", "not 'many'"),
        ("IOT_MAX_BATCH_SIZE", "1.5", "whole number"),
        ("IOT_MAX_DEAD_LETTER_SHARE", "1.1", "at most 1"),
        ("IOT_MAX_DEAD_LETTER_SHARE", "nan", "at least 0"),
        ("IOT_MAX_RECORD_BYTES", "inf", "whole number of bytes"),
        ("IOT_METRICS_PORT", "70000", "at most 65535"),
        ("IOT_LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("IOT_GROUP_ID", " ", "must not be empty: consumer group"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_needed(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load(InferSettings, environment={name: value})
    assert name in str(caught.value)
    assert caught.value.exit_status == 78


def test_the_origin_of_a_wrong_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--max-batch-size must"):
        load(InferSettings, {"max_batch_size": "x"}, {})
    (tmp_path / "iot-inference.env").write_text("IOT_MAX_BATCH_SIZE=x\n")
    with pytest.raises(ConfigError, match=r"IOT_MAX_BATCH_SIZE in .*iot-inference\.env must"):
        load(InferSettings, environment={})


NUMBERS = [
    pytest.param(command.settings, declared, id=f"{command.name} {declared.name}")
    for command in COMMANDS
    for declared in fields(command.settings)
    if isinstance(declared.default, int | float) and not isinstance(declared.default, bool)
]


@pytest.mark.parametrize("kind,declared", NUMBERS)
def test_every_number_has_bounds(kind: type[CommandSettings], declared: Any) -> None:
    about = declared.metadata
    assert about["minimum"] <= declared.default <= about["maximum"]
    for wrong in ("-1", "1e300", "9" * 400, "inf", "nan", "", "0x10", "1\n2"):
        with pytest.raises(ConfigError, match="at least"):
            load(kind, {declared.name: wrong}, {})


def test_why_a_number_is_the_largest_is_said() -> None:
    with pytest.raises(ConfigError, match=r"at most 20.0, not '60': a service that waits longer"):
        load(StoreSettings, environment={"IOT_STORE_TIMEOUT": "60"})
    with pytest.raises(ConfigError, match=r"not '0.01'$"):
        load(StoreSettings, environment={"IOT_STORE_TIMEOUT": "0.01"})


def test_an_answer_is_awaited_no_longer_than_the_watchdog_and_the_stop_wait() -> None:
    unit = (Path(__file__).parents[2] / "roles/pipeline_app/templates/service.j2").read_text()
    stop = re.search(r"(?m)^TimeoutStopSec=(\d+)$", unit)
    assert stop
    assert min(worker.SILENCE_SECONDS, float(stop[1])) > settings.MAX_STORE_TIMEOUT


# All of them, so that a new one has to be thought about.
FLAGS_ALONE = {
    "audit": {"since", "expect", "json", "record"},
    "backup": {"file", "json"},
    "restore": {"file", "check", "compare", "json"},
    "dead-letters list": {"which", "reason", "stage", "since", "until", "all", "json"},
    "dead-letters show": {"which", "reason", "stage", "since", "until", "all", "json"},
    "dead-letters replay": {
        *("which", "reason", "stage", "since", "until", "all", "dry_run", "yes"),
    },
    "dead-letters drop": {"which", "reason", "stage", "since", "until", "dry_run", "yes"},
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_what_is_about_one_run_only_its_command_line_says(
    command: settings.Command, tmp_path: Path
) -> None:
    alone = {f.name for f in fields(command.settings) if f.metadata["flag_only"]}
    assert alone == FLAGS_ALONE.get(command.name, set())
    variables = {environment_name(name): "1" for name in alone}
    file = tmp_path / "file"
    file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    loaded = load(command.settings, {"env_file": str(file)}, variables)
    assert describe(loaded) == describe(load(command.settings, {"env_file": "/dev/null"}, {}))
    assert all(getattr(load(command.settings, {name: "1"}, {}), name) for name in alone)


def test_what_only_a_command_line_says_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--expect must be"):
        load(AuditSettings, {"expect": "many"}, {})


@pytest.mark.parametrize("text,value", [("true", True), ("1", True), ("No", False), ("0", False)])
def test_booleans(text: str, value: bool) -> None:
    assert load(ProduceSettings, environment={"IOT_SHUFFLE": text}).shuffle is value


def test_a_wrong_boolean() -> None:
    with pytest.raises(ConfigError, match="true or false"):
        load(ProduceSettings, environment={"IOT_SHUFFLE": "maybe"})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_every_setting_with_its_variable(
    command: settings.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.name.split(), "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for declared in fields(command.settings):
        if declared.metadata["positional"]:
            assert f" {declared.metadata['metavar']} {declared.metadata['help']}" in text
            continue
        assert settings.flag_name(declared.name) in text
        variable = environment_name(declared.name)
        assert (f"({variable};" in text) is not declared.metadata["flag_only"]


def test_some_commands_are_about_any_number_of_things() -> None:
    parser = cli.build_parser()
    for words in ([], ["0:17", "0:18"]):
        flags = vars(parser.parse_args(["dead-letters", "list", *words, "--reason", "too-large"]))
        loaded = load(ListDeadLettersSettings, flags, {})
        assert (loaded.which, loaded.reason) == (" ".join(words), "too-large")


def test_a_group_of_commands_wants_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["dead-letters"])
    assert "ACTION" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["audti"],
        ["audit", "--jsn"],
        ["audit", "--grace"],
        ["dead-letters"],
        ["dead-letters", "dorp"],
        ["dead-letters", "drop", "--al"],
        ["backup"],
    ],
    ids=" ".join,
)
def test_a_typo_is_no_outage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == Exit.USAGE
    assert "usage: iot-pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error,status",
    [
        (RuntimeError("unforeseen"), Exit.INTERNAL),
        (MemoryError(), Exit.INTERNAL),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
    ],
    ids=repr,
)
def test_what_kept_a_command_from_an_answer_is_no_answer(
    error: BaseException,
    status: Exit,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: AuditSettings) -> int:
        raise error

    monkeypatch.setattr(audit, "run", fail)
    assert cli.main(["audit", "--env-file", "/dev/null"]) == status
    assert ("Traceback" in capsys.readouterr().err) is (status == Exit.INTERNAL)


def test_a_reader_that_leaves_is_no_error_of_ours() -> None:
    main = (
        "import sys; from iot_pipeline import audit, cli; "
        "audit.run = lambda _: print('line ' * 100_000) or 0; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = f"{sys.executable} -c {shlex.quote(main)} audit --env-file /dev/null | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (Exit.IO, "")


def test_what_a_command_is_about_needs_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    flags = vars(cli.build_parser().parse_args(["backup", "/backups/one"]))
    assert load(BackupSettings, flags, {}).file == "/backups/one"
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["backup"])
    assert "FILE" in capsys.readouterr().err


def test_flags_reach_the_settings() -> None:
    flags = vars(
        cli.build_parser().parse_args(
            ["produce", "--interval", "0.5", "--shuffle", "--source", "/images"]
        )
    )
    loaded = load(ProduceSettings, flags, {})
    assert (loaded.interval, loaded.shuffle, loaded.source) == (0.5, True, "/images")


def test_no_setting_holds_a_secret() -> None:
    for command in COMMANDS:
        names = set(describe(load(command.settings, environment={})))
        secret = {name for name in names if "password" in name}
        assert secret <= {"store_password_file", "sasl_password_file"}


@pytest.mark.parametrize(
    "url,place,name,tls",
    [
        ("couchdb://db/img_db", "db:5984", "img_db", False),
        ("couchdb://db/img_db?tls=true", "db:6984", "img_db", True),
        ("couchdb://[::1]:1/img_db?tls=false", "[::1]:1", "img_db", False),
        ("mongodb://db/kafka_db.image", "db:27017", "kafka_db.image", False),
        ("mongodb://a,b:2/kafka_db.of.three?tls=true", "a:27017,b:2", "kafka_db.of.three", True),
    ],
)
def test_where_documents_are_stored_is_one_url(url: str, place: str, name: str, tls: bool) -> None:
    address = load(StoreSettings, environment={"IOT_STORE_URL": url}).store_address
    assert (address.place, address.name, address.tls) == (place, name, tls)
    assert address.options == {}


def test_a_url_s_other_options_are_for_the_database_s_client() -> None:
    url = "mongodb://db/kafka_db.image?tls=true&replicaSet=rs0&retryWrites=false&authSource=a%2Db"
    address = load(StoreSettings, environment={"IOT_STORE_URL": url}).store_address
    assert (address.database, address.collection) == ("kafka_db", "image")
    assert address.options == {"replicaSet": "rs0", "retryWrites": "false", "authSource": "a-b"}


@pytest.mark.parametrize(
    "environment,words",
    [
        ({"IOT_STORE_URL": "couchdb://admin:hush@db/img_db"}, "IOT_STORE_PASSWORD_FILE"),
        ({"IOT_STORE_URL": "hptt://admin:hush@db/img_db"}, "IOT_STORE_PASSWORD_FILE"),
        ({"IOT_STORE_URL": "mongodb://admin:hush@db/kafka_db.image"}, "IOT_STORE_PASSWORD_FILE"),
        ({"IOT_STORE_URL": "db:5984"}, "must be a URL such as couchdb://.* or mongodb://"),
        ({"IOT_STORE_URL": "http://db:5984/img_db"}, "must be a URL such as couchdb://"),
        ({"IOT_STORE_URL": "mongodb+srv://db/kafka_db.image"}, "must be a URL such as"),
        ({"IOT_STORE_URL": "couchdb://db:5984"}, "must look like couchdb://"),
        ({"IOT_STORE_URL": "couchdb://db:5984/"}, "must look like couchdb://"),
        ({"IOT_STORE_URL": "couchdb://db/one/two"}, "must look like couchdb://"),
        ({"IOT_STORE_URL": "couchdb://one,two/img_db"}, "must look like couchdb://"),
        ({"IOT_STORE_URL": "mongodb://db/kafka_db"}, "must look like mongodb://"),
        ({"IOT_STORE_URL": "mongodb://db/kafka_db."}, "must look like mongodb://"),
        ({"IOT_STORE_URL": "mongodb://db/.image"}, "must look like mongodb://"),
        ({"IOT_STORE_URL": "mongodb:///kafka_db.image"}, "'' is no host"),
        ({"IOT_STORE_URL": "mongodb://a,,b/kafka_db.image"}, "'' is no host"),
        ({"IOT_STORE_URL": "mongodb://db:70000/kafka_db.image"}, "'db:70000' is no host"),
        ({"IOT_STORE_URL": "mongodb://db:port/kafka_db.image"}, "'db:port' is no host"),
        ({"IOT_STORE_URL": "couchdb://db/img_db?tls=yes"}, "tls must be true or false, not 'yes'"),
        ({"IOT_STORE_URL": "couchdb://db/img_db?password=hush"}, "no option 'password' is known"),
        (
            {"IOT_STORE_URL": "mongodb://db/a.b?tlsInsecure=true"},
            "no option 'tlsInsecure' is known",
        ),
        ({"IOT_STORE_URL": "mongodb://db/a.b?tls=true&tls=false"}, "tls needs one value"),
        ({"IOT_STORE_URL": "mongodb://db/a.b?replicaSet"}, "replicaSet needs one value"),
        ({"IOT_STORE_USER": "iot"}, "needs IOT_STORE_PASSWORD_FILE"),
    ],
)
def test_what_reaches_the_database_is_checked_before_it_is_logged(
    environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load(StoreSettings, environment=environment)
    assert "hush" not in str(caught.value)


STORES = {"couchdb": "img_db", "mongodb": "kafka_db.image"}


@pytest.mark.parametrize("scheme", STORES)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.1.1", "[::1]"])
def test_this_host_s_own_database_may_be_asked_in_the_clear(scheme: str, host: str) -> None:
    environment = {"IOT_STORE_USER": "iot", "IOT_STORE_PASSWORD_FILE": "/p"}
    url = f"{scheme}://{host}:1/{STORES[scheme]}"
    load(StoreSettings, environment=environment | {"IOT_STORE_URL": url})


@pytest.mark.parametrize("scheme", STORES)
@pytest.mark.parametrize("host", ["db", "192.168.56.14", "[fe80::1]", "localhost.example.org"])
def test_no_password_travels_to_another_host_in_the_clear(scheme: str, host: str) -> None:
    environment = {"IOT_STORE_USER": "iot", "IOT_STORE_PASSWORD_FILE": "/p"}
    url = f"{scheme}://{host}:1/{STORES[scheme]}"
    with pytest.raises(ConfigError, match=r"to the network: add tls=true.*IOT_STORE_CA_FILE"):
        load(StoreSettings, environment=environment | {"IOT_STORE_URL": url})
    load(StoreSettings, environment=environment | {"IOT_STORE_URL": f"{url}?tls=true"})
    load(StoreSettings, environment={"IOT_STORE_URL": url})


def test_one_host_of_many_in_the_clear_is_one_too_many() -> None:
    environment = {"IOT_STORE_USER": "iot", "IOT_STORE_PASSWORD_FILE": "/p"}
    environment["IOT_STORE_URL"] = "mongodb://localhost,db/kafka_db.image"
    with pytest.raises(ConfigError, match="add tls=true"):
        load(StoreSettings, environment=environment)


@pytest.fixture
def secure(tmp_path: Path) -> dict[str, str]:
    """All that secures a connection to Kafka, in files that are there."""
    for name in ("password", "ca.pem", "host.pem", "host.key"):
        (tmp_path / name).write_text("x")
    return {
        "IOT_SECURITY_PROTOCOL": "SASL_SSL",
        "IOT_SASL_USERNAME": "iot-storage",
        "IOT_SASL_PASSWORD_FILE": str(tmp_path / "password"),
        "IOT_TLS_CA_FILE": str(tmp_path / "ca.pem"),
        "IOT_TLS_CERTIFICATE_FILE": str(tmp_path / "host.pem"),
        "IOT_TLS_KEY_FILE": str(tmp_path / "host.key"),
    }


USER = ("IOT_SASL_USERNAME", "IOT_SASL_PASSWORD_FILE")
CERTIFICATE = ("IOT_TLS_CERTIFICATE_FILE", "IOT_TLS_KEY_FILE")


def test_how_kafka_is_reached(secure: dict[str, str]) -> None:
    plain = load(AuditSettings, environment={})
    assert (plain.uses_tls, plain.uses_sasl) == (False, False)
    both = load(AuditSettings, environment=secure)
    assert (both.uses_tls, both.uses_sasl) == (True, True)
    assert both.sasl_mechanism == "SCRAM-SHA-512"
    assert both.principal == "user 'iot-storage'"
    mutual = {name: value for name, value in secure.items() if name not in USER}
    loaded = load(AuditSettings, environment=mutual | {"IOT_SECURITY_PROTOCOL": "SSL"})
    assert (loaded.uses_tls, loaded.uses_sasl) == (True, False)
    assert "host.pem" in loaded.principal


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"IOT_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, "SASL_PLAINTEXT is refused.*set SASL_SSL"),
        ({"IOT_SECURITY_PROTOCOL": "TLS"}, "IOT_SECURITY_PROTOCOL must be one of PLAINTEXT, SSL"),
        ({"IOT_SECURITY_PROTOCOL": " "}, "IOT_SECURITY_PROTOCOL must not be empty"),
        ({"IOT_SECURITY_PROTOCOL": "SSL"}, "IOT_SASL_USERNAME has no effect .* set SASL_SSL"),
        (
            {"IOT_SECURITY_PROTOCOL": "PLAINTEXT"} | dict.fromkeys(USER, ""),
            "IOT_TLS_CA_FILE has no effect .* set SSL or SASL_SSL",
        ),
        ({"IOT_SASL_MECHANISM": "GSSAPI"}, "IOT_SASL_MECHANISM must be one of SCRAM-SHA-512, PLAI"),
        ({"IOT_SASL_USERNAME": ""}, "SASL_SSL needs IOT_SASL_USERNAME"),
        ({"IOT_SASL_PASSWORD_FILE": ""}, "SASL_SSL needs IOT_SASL_PASSWORD_FILE"),
        ({"IOT_TLS_KEY_FILE": ""}, "IOT_TLS_CERTIFICATE_FILE needs IOT_TLS_KEY_FILE"),
        ({"IOT_TLS_CERTIFICATE_FILE": ""}, "IOT_TLS_KEY_FILE needs IOT_TLS_CERTIFICATE_FILE"),
        *(
            ({name: "/nowhere/file"}, f"{name}: .*No such file")
            for name in (USER[1], "IOT_TLS_CA_FILE", *CERTIFICATE)
        ),
        ({"IOT_STORE_CA_FILE": "/nowhere/ca"}, "IOT_STORE_CA_FILE: .*No such file"),
    ],
)
def test_what_does_not_secure_a_connection_is_named(
    secure: dict[str, str], changes: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(StoreSettings, environment=secure | changes)


def test_a_wrong_setting_ends_the_command_with_its_own_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["infer", "--max-batch-size", "0"]) == Exit.CONFIG
    assert "--max-batch-size must be" in capsys.readouterr().err


def test_common_settings_mean_the_same_everywhere() -> None:
    for command in COMMANDS:
        assert issubclass(command.settings, CommandSettings)
        assert command.settings.SERVICE
        assert command.settings.DESCRIPTION
