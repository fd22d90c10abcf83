"""The lab's command line: lab/bin/lab."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from iot_lab import (
    ansible,
    artifacts,
    hosts,
    images,
    locks,
    package_cache,
    paths,
    remote,
    report,
    setup,
    up,
)
from iot_lab.command_line import Exit, Parser
from iot_lab.console import Colour, paint, say, step
from iot_lab.shell import LabError, stop_on_signals

URGENT = -10  # the niceness of what must answer soon


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    # What follows these names is theirs to read: argparse would stumble over its options.
    passed_on: list[str] = []
    if words[:1] in (["artifacts"], ["audit"], ["bench"], ["dead-letters"], ["demo"], ["drill"]):
        words, passed_on = words[:1], words[1:]
    options = _parser().parse_args(words)
    options.passed_on = passed_on
    command: Callable[[argparse.Namespace], int] = options.command
    stop_on_signals()
    try:
        return command(options)
    except LabError as error:
        print(f"{paint('lab:', Colour.BAD)} {error}", file=sys.stderr)
        return Exit.UNAVAILABLE
    except KeyboardInterrupt:
        print("lab: interrupted; run the command again to go on", file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception:  # noqa: BLE001 - Python's own status for it, 1, is an answer here
        traceback.print_exc()
        return Exit.INTERNAL


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lab",
        description="The pipeline on hosts of this machine. `make help` lists the usual commands.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Command:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(command=run)
        return command

    def add_topology(command: _Command) -> None:
        command.add_argument(
            "--topology",
            default=os.environ.get("TOPOLOGY") or "couchdb",
            choices=hosts.topologies(),
            help="a folder of inventory/ (default: $TOPOLOGY, else couchdb)",
        )

    def add_sources(command: _Command) -> None:
        command.add_argument(
            "--official",
            action="store_true",
            default=os.environ.get("OFFICIAL", "") not in {"", "0"},
            help="use production's sources of software, see lab/official.yml (default: $OFFICIAL)",
        )

    command = add("up", _up, "install, boot, converge, verify and report: the whole lab")
    add_topology(command)
    add_sources(command)
    command.add_argument(
        "--dataset",
        default=os.environ.get("DATASET") or None,
        metavar="PATH",
        help="folder or tar of class-named folders that the producer sends (default: $DATASET, "
        "else the drawings that ship)",
    )
    command.add_argument(
        "--profile",
        action="store_true",
        default=os.environ.get("PROFILE", "") not in {"", "0"},
        help="show how long each of Ansible's tasks takes (default: $PROFILE)",
    )

    command = add("check", _check, "tell whether this machine can run the hosts")
    add_topology(command)

    command = add("setup", _setup, "install what is missing on this machine")
    command.add_argument(
        "profile",
        nargs="?",
        default="lab",
        choices=setup.PROFILES,
        help="; ".join(f"{name}: {text}" for name, text in setup.PROFILES.items()),
    )

    command = add("prepare", _prepare, "make images, archives, network and key for vagrant up")
    add_topology(command)
    add_sources(command)
    command.add_argument(
        "--no-hosts",
        action="store_true",
        help="neither images nor network: another provider has its own",
    )

    command = add("images", _images, "build the base images that are missing or outdated")
    command.add_argument("systems", nargs="*", metavar="SYSTEM", help=", ".join(images.SUITES))

    add("key", _key, "make the lab's SSH key and print its path")
    add(
        "artifacts",
        _artifacts,
        "build the archives of Kafka and of the database, and the apps' wheel",
    )

    add("ansible", _ansible, "print the settings of the lab's Ansible, for a shell's eval")

    command = add("status", _status, "show hosts and services")
    add_topology(command)
    command = add("report", _report, "show hosts, services, topics and images")
    add_topology(command)

    command = add("audit", _audit, "run `iot-pipeline audit` on a storage host, with its options")
    add_topology(command)

    command = add("health", _health, "tell what is wrong; exit status 0, 1, 2 or 3")
    add_topology(command)
    command.add_argument("--json", action="store_true", help="the whole report, on one line")

    command = add(
        "dead-letters",
        _dead_letters,
        "run `iot-pipeline dead-letters` on a storage host, with its options",
    )
    add_topology(command)

    command = add("ssh", _ssh, "open a shell on a host, or run a command there")
    add_topology(command)
    command.add_argument("host", help="its name in the inventory")
    command.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")

    add("demo", _demo, "run the pipeline as plain processes, without hosts")

    add("bench", _bench, "measure the pipeline on the running lab")

    add("drill", _drill, "break the running lab while images flow, and audit")

    add("destroy", _destroy, "remove hosts, network and secrets; the cache stays")
    add("clean", _clean, "remove everything that was made here: hosts, images, tools, downloads")
    add("lock", _lock, "renew the hash-locked requirements of tools and apps")
    return parser


def _up(options: argparse.Namespace) -> int:
    dataset = None
    if options.dataset:
        dataset = Path(options.dataset).expanduser().resolve()
        if not dataset.exists():
            raise LabError(f"DATASET: there is no {dataset}")
    return up.up(up.Options(options.topology, options.official, dataset, options.profile))


def _check(options: argparse.Namespace) -> int:
    up.check(options.topology)
    say("This machine can run the lab's hosts.")
    return 0


def _setup(options: argparse.Namespace) -> int:
    setup.setup(options.profile)
    if options.profile == "test":
        package_cache.program()
    return 0


def _prepare(options: argparse.Namespace) -> int:
    wanted = up.Options(options.topology, options.official)
    up.prepare(wanted, with_hosts=not options.no_hosts)
    # Vagrant boots hosts without Ansible, too.
    if (paths.TOOLS / "bin" / "ansible").exists():
        up.package_cache_for(wanted)
    return 0


def _ansible(_options: argparse.Namespace) -> int:
    for name, value in ansible.settings().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _images(options: argparse.Namespace) -> int:
    unknown = sorted(set(options.systems) - set(images.SUITES))
    if unknown:
        raise LabError(f"no image is called {', '.join(unknown)}: {', '.join(images.SUITES)}")
    with step("Build the base images"):
        images.ensure(options.systems or images.SUITES)
    return 0


def _key(_: argparse.Namespace) -> int:
    say(str(setup.ssh_key()))
    return 0


def _artifacts(options: argparse.Namespace) -> int:
    return artifacts.main(options.passed_on)


def _status(options: argparse.Namespace) -> int:
    return 0 if up.print_status(options.topology) else 1


def _report(options: argparse.Namespace) -> int:
    return 0 if up.print_report(options.topology) else 1


def _audit(options: argparse.Namespace) -> int:
    return _ask_storage("audit", options)


def _dead_letters(options: argparse.Namespace) -> int:
    return _ask_storage("dead-letters", options)


def _ask_storage(command: str, options: argparse.Namespace) -> int:
    """Run a command of the apps on a storage host, which has settings for it."""
    storage = report.auditor(hosts.machines(options.topology))
    if storage is None:
        raise LabError("no host of the inventory is in the group storage_nodes")
    words = shlex.join(["sudo", "iot-pipeline", command, *options.passed_on])
    return _replace(remote.command(storage, words, terminal=_has_terminal()))


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _health(options: argparse.Namespace) -> int:
    inventory = paths.INVENTORY / options.topology
    os.environ["PATH"] = f"{paths.TOOLS / 'bin'}:{os.environ['PATH']}"
    program = str(paths.ROOT / "ansible" / "health")
    form = ["--json"] if options.json else []
    # A control host is elsewhere. Here it shares its cores with hosts that may all be busy.
    with suppress(PermissionError):
        os.nice(URGENT)
    return _replace([program, *form, f"--inventory={inventory}"])


def _ssh(options: argparse.Namespace) -> int:
    machines = {machine.name: machine for machine in hosts.machines(options.topology)}
    if options.host not in machines:
        raise LabError(f"no host is called {options.host}: HOST is one of {', '.join(machines)}")
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    return _replace(remote.command(machines[options.host], *words, terminal=_has_terminal()))


def _demo(options: argparse.Namespace) -> int:
    setup.setup("demo")
    python = str(paths.APPS / "bin" / "python")
    return _replace([python, "-m", "iot_lab.demo", *options.passed_on])


def _bench(options: argparse.Namespace) -> int:
    setup.environments("lab")
    python = str(paths.TOOLS / "bin" / "python")
    return _replace([python, "-m", "iot_lab.bench", *options.passed_on])


def _drill(options: argparse.Namespace) -> int:
    setup.environments("lab")
    python = str(paths.TOOLS / "bin" / "python")
    return _replace([python, "-m", "iot_lab.drills", *options.passed_on])


def _destroy(_: argparse.Namespace) -> int:
    with step("Remove the lab's hosts and network"):
        up.destroy()
    return 0


def _clean(_: argparse.Namespace) -> int:
    with step("Remove everything that was made here"):
        up.clean()
    return 0


def _lock(_: argparse.Namespace) -> int:
    locks.renew()
    return 0


def _replace(command: list[str]) -> int:
    """Become another program, so that its signals and its exit status are the user's."""
    sys.stdout.flush()
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


_Command = argparse.ArgumentParser
