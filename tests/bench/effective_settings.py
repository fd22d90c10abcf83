"""Prints the settings in effect of this host's services, as JSON by service and variable.

Runs on a host as root, in the apps' environment.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from iot_pipeline.settings import COMMANDS, SETTINGS_DIRECTORY, environment_name, load


def precision(settings: Any) -> str:
    """What `auto` came to with this host's engine and model."""
    from iot_pipeline.classifier import find_prepared
    from iot_pipeline.model import find_model

    model = find_model(settings.model, settings.model_revision or None)
    return find_prepared(model, settings.engine, "auto", settings.model_cache)[0]


def main() -> None:
    found: dict[str, dict[str, object]] = {}
    for command in COMMANDS:
        service = getattr(command.settings, "SERVICE", "")
        file = SETTINGS_DIRECTORY / f"{service}.env"
        if not Path(file).exists():
            continue
        settings = load(command.settings, {"env_file": str(file)}, {})
        values = {
            environment_name(declared.name): getattr(settings, declared.name)
            for declared in fields(settings)
            if not declared.metadata["flag_only"]
        }
        if values.get("IOT_PRECISION") == "auto":
            values["IOT_PRECISION"] = precision(settings)
        found.setdefault(service, {}).update(values)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
