"""The console script `iot-pipeline`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from iot_pipeline.errors import ConfigError, Exit, PipelineError
from iot_pipeline.settings import COMMANDS, GROUPS, add_arguments, load


def _version() -> str:
    try:
        return version("iot-pipeline")
    except PackageNotFoundError:
        return "not installed"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="iot-pipeline",
        description="Image inference over Kafka. Each command runs by hand just as by systemd.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups = {"": commands}
    for name, text in GROUPS.items():
        group = commands.add_parser(name, help=text, description=f"{text}.")
        groups[name] = group.add_subparsers(required=True, metavar="ACTION")
    for command in COMMANDS:
        group_name, _, name = command.name.rpartition(" ")
        subparser = groups[group_name].add_parser(
            name,
            help=command.settings.DESCRIPTION.split(". ")[0].split(":")[0].rstrip("."),
            description=command.settings.DESCRIPTION,
            epilog="A flag wins over the environment, the environment over the settings file.",
        )
        add_arguments(subparser, command.settings)
        subparser.set_defaults(selected=command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status (see `errors.Exit`)."""
    flags = vars(build_parser().parse_args(arguments))
    command = flags.pop("selected")
    try:
        settings = load(command.settings, flags)
        try:
            # Only now: `produce` must not need torch, nor `infer` a database client.
            module = importlib.import_module(command.module)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("iot_pipeline"):
                raise
            raise ConfigError(
                f"`iot-pipeline {command.name}` needs the Python package {error.name}, "
                "which is not installed here"
            ) from error
        return int(module.run(settings))
    except PipelineError as error:
        if not error.logged:
            print(f"iot-pipeline {command.name}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
