"""Tries to be let in by brokers, each by itself, with an app's settings changed in several ways.

    stdin   {"app": "iot-producer", "servers": ["broker:9092"], "files": {"wrong": "a password"},
             "ways": {"a wrong password": {"IOT_SASL_PASSWORD_FILE": "{wrong}"}}}
    stdout  {"broker:9092": {"a wrong password": "refuses user 'iot-producer': …"}}

What it prints is what kept it out, or nothing where it was let in. Files are there while it runs,
for root alone.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from iot_pipeline.access import find_problem
from iot_pipeline.settings import COMMANDS, CommandSettings, load

SETTINGS: dict[str, type[CommandSettings]] = {
    command.settings.SERVICE: command.settings for command in COMMANDS
}


def main(asked: dict[str, Any]) -> None:
    problems: dict[str, dict[str, str]] = {server: {} for server in asked["servers"]}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in asked["files"]}
        for name, path in places.items():
            path.touch(mode=0o600)
            path.write_text(asked["files"][name])
        for server, found in problems.items():
            for way, changes in asked["ways"].items():
                environment = {key: text.format(**places) for key, text in changes.items()}
                environment["IOT_BOOTSTRAP_SERVERS"] = server
                settings: Any = load(SETTINGS[asked["app"]], environment=environment)
                found[way] = find_problem(settings)
    print(json.dumps(problems))


if __name__ == "__main__":
    main(json.load(sys.stdin))
