"""The console script `iot-pipeline`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from iot_pipeline.errors import ConfigError, Exit, PipelineError
from iot_pipeline.settings import COMMANDS, GROUPS, Command, add_arguments, load


class _Parser(argparse.ArgumentParser):
    """Its subparsers are of its kind."""

    def error(self, message: str) -> NoReturn:
        """End with the status of wrong usage; argparse's own is 2."""
        self.print_usage(sys.stderr)
        self.exit(Exit.USAGE, f"{self.prog}: {message}\n")


def _version() -> str:
    try:
        return version("iot-pipeline")
    except PackageNotFoundError:
        return "not installed"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(
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
        status = _run(command, flags)
        # Now, not at the interpreter's end, which would give an error a status of its own.
        sys.stdout.flush()
    except PipelineError as error:
        if not error.logged:
            print(f"iot-pipeline {command.name}: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # Who read the output has left, as `head` does. What is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.IO
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception:  # noqa: BLE001 - Python's own status for it, 1, is an answer here
        traceback.print_exc()
        return Exit.INTERNAL
    return status


def _run(command: Command, flags: dict[str, Any]) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
