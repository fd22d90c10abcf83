"""Every role keeps the shape and the promises that README and its argument specs make.

A rule is a function from a role's folder to the list of its breaches. It is run on every role, and
on one role made to breach it, so that no rule can rot into one that always passes.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ROLES = sorted(p for p in (ROOT / "roles").iterdir() if p.is_dir())
OURS = {
    p.stem for p in [*ROOT.glob("roles/*/library/*.py"), *ROOT.glob("roles/*/action_plugins/*.py")]
}

Rule = Callable[[Path], list[str]]

TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
    "raw": (object,),
}

UNIT = re.compile(
    r"\b(milliseconds|seconds|minutes|hours|days|bytes|KiB|MiB|GiB|percent|share|port|number"
    r"|count|id|pixels|seed)\b",
    re.IGNORECASE,
)

# What Ansible itself provides under this prefix. Everything else that begins so is a fact injected
# into the namespace of variables, which goes away in a later Ansible.
NOT_FACTS = (
    "become",
    "check_mode",
    "collections",
    "config_file",
    "connection",
    "diff_mode",
    "facts",
    "failed_result",
    "failed_task",
    "host",
    "inventory_sources",
    "job_id",
    "loop",
    "managed",
    "parent_role_names",
    "password",
    "play_batch",
    "play_hosts",
    "play_hosts_all",
    "play_name",
    "playbook_python",
    "port",
    "python_interpreter",
    "role_name",
    "run_tags",
    "search_path",
    "skip_tags",
    "ssh_common_args",
    "ssh_extra_args",
    "ssh_private_key_file",
    "user",
    "verbosity",
    "version",
)
INJECTED_FACT = re.compile(rf"(?<![\w./-])ansible_(?!(?:{'|'.join(NOT_FACTS)})\b)[a-z]\w*")

TASK_LISTS = ("block", "rescue", "always")
INCLUDES = {"include_tasks", "import_tasks", "include_role", "import_role"}
BANNED = {"shell", "raw", "apt_key", "apt_repository"}
OVER_THE_NETWORK = {"apt", "get_url", "pip"}


@functools.cache
def load(path: Path) -> Any:
    """Reads a YAML file; a missing or an empty one is an empty mapping."""
    return (yaml.safe_load(path.read_text()) if path.exists() else None) or {}


def options(role: Path) -> dict[str, Any]:
    specs = load(role / "meta/argument_specs.yml").get("argument_specs", {})
    found: dict[str, Any] = specs.get("main", {}).get("options", {})
    return found


def task_files(role: Path) -> list[Path]:
    return sorted([*role.glob("tasks/*.yml"), *role.glob("handlers/*.yml")])


def tasks(entries: Any) -> Iterator[dict[str, Any]]:
    for entry in entries or []:
        yield entry
        for key in TASK_LISTS:
            yield from tasks(entry.get(key))


def module(task: dict[str, Any]) -> str | None:
    """The module a task calls, or None for a block. Found by its dot or by being ours."""
    for key in task:
        if "." in key or key in OURS | BANNED | INCLUDES:
            return str(key)
    return None


def role_tasks(role: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in task_files(role):
        for task in tasks(load(path)):
            yield f"{path.relative_to(role)}: {task.get('name', '(no name)')}", task


def is_expression(value: Any) -> bool:
    return isinstance(value, str) and "{{" in value


def files_are_there(role: Path) -> list[str]:
    wanted = ("meta/main.yml", "meta/argument_specs.yml", "defaults/main.yml", "tasks/main.yml")
    found = [f"{name} is missing" for name in wanted if not (role / name).is_file()]
    license_ = load(role / "meta/main.yml").get("galaxy_info", {}).get("license")
    if license_ != "Apache-2.0":
        found.append(f"meta/main.yml: licensed as {license_}, not as LICENSE says")
    return found


def every_option_has_its_default(role: Path) -> list[str]:
    """A required option has no default; every other one has it in defaults/main.yml."""
    defaults = set(load(role / "defaults/main.yml"))
    required = {name for name, spec in options(role).items() if spec.get("required")}
    optional = set(options(role)) - required
    return (
        [f"{name}: in the specs, neither required nor in defaults" for name in optional - defaults]
        + [f"{name}: required, yet it has a default" for name in required & defaults]
        + [f"{name}: in defaults, not in the specs" for name in defaults - optional - required]
    )


def defaults_equal_the_specs(role: Path) -> list[str]:
    """An expression stands in defaults alone: the specs would show it unevaluated."""
    found = []
    for name, value in load(role / "defaults/main.yml").items():
        spec = options(role).get(name, {})
        if is_expression(value):
            if "default" in spec and spec["default"] != value:
                found.append(f"{name}: the specs say {spec['default']!r} for an expression")
        elif "default" not in spec:
            found.append(f"{name}: the specs give no default for {value!r}")
        elif spec["default"] != value or type(spec["default"]) is not type(value):
            found.append(f"{name}: defaults {value!r}, specs {spec['default']!r}")
    return found


def defaults_have_their_type(role: Path) -> list[str]:
    found = []
    for name, value in load(role / "defaults/main.yml").items():
        wanted = options(role).get(name, {}).get("type", "raw")
        if is_expression(value) or wanted not in TYPES:
            continue
        # In Python a bool is an int.
        stray_bool = isinstance(value, bool) and wanted in {"int", "float"}
        if not isinstance(value, TYPES[wanted]) or stray_bool:
            found.append(f"{name}: {value!r} is no {wanted}")
    return found


def options_are_documented(role: Path) -> list[str]:
    found = []
    for name, spec in options(role).items():
        text = spec.get("description") or ""
        text = " ".join(text) if isinstance(text, list) else text
        if spec.get("type") not in TYPES:
            found.append(f"{name}: no type, or none that Ansible knows")
        if spec.get("type") == "list" and "elements" not in spec:
            found.append(f"{name}: a list of what? `elements` is missing")
        if len(text.split()) < 2:
            found.append(f"{name}: no description")
        elif spec.get("type") in {"int", "float"} and not UNIT.search(text):
            found.append(f"{name}: the description names no unit: {text}")
    return found


def names_carry_the_role(role: Path) -> list[str]:
    found = [f"{n}: not {role.name}_…" for n in options(role) if not n.startswith(f"{role.name}_")]
    for path in role.glob("vars/*.yml"):
        found += [
            f"{path.name}: {n}: not _{role.name}_…"
            for n in load(path)
            if not n.startswith(f"_{role.name}_")
        ]
    for where, task in role_tasks(role):
        registered = task.get("register")
        if registered and not registered.startswith(f"__{role.name}_"):
            found.append(f"{where}: registers {registered}, not __{role.name}_…")
        for name in task.get("ansible.builtin.set_fact", {}):
            if name != "cacheable" and not name.startswith(f"_{role.name}_"):
                found.append(f"{where}: sets {name}, not _{role.name}_…")
    return found


def main_is_a_table_of_contents(role: Path) -> list[str]:
    found = []
    for task in load(role / "tasks/main.yml") or [{}]:
        called = (module(task) or "").rpartition(".")[2]
        if called not in INCLUDES:
            found.append(f"{task.get('name', task)}: main.yml only includes and imports")
        elif called.endswith("_tasks"):
            arguments = task[str(module(task))]
            name = arguments["file"] if isinstance(arguments, dict) else arguments
            if not is_expression(name) and not (role / "tasks" / name).is_file():
                found.append(f"{task['name']}: tasks/{name} is missing")
    return found


def modules_are_builtin_or_ours(role: Path) -> list[str]:
    """One collection beyond ansible-core is needed to run the roles, for certificates."""
    found = []
    for where, task in role_tasks(role):
        called = module(task)
        if called is None:
            if not set(TASK_LISTS) & set(task):
                found.append(f"{where}: no fully qualified module")
        elif called.rpartition(".")[2] in BANNED:
            found.append(f"{where}: {called} is not used here")
        elif "." in called and not called.startswith(("ansible.builtin.", "community.crypto.")):
            found.append(f"{where}: {called} needs a collection")
    return found


def network_tasks_are_retried(role: Path) -> list[str]:
    return [
        f"{where}: goes over the network once only; give it retries and delay"
        for where, task in role_tasks(role)
        if (module(task) or "").rpartition(".")[2] in OVER_THE_NETWORK
        and not {"retries", "delay"} <= set(task)
    ]


def packages_come_by_one_role(role: Path) -> list[str]:
    """Only that one knows how to ask no mirror where nothing is missing."""
    return [
        f"{where}: let the role packages do it"
        for where, task in role_tasks(role)
        if (module(task) or "").rpartition(".")[2] in {"apt", "deb822_repository"}
        and role.name != "packages"
    ]


@functools.cache
def registered_by(role: Path) -> set[str]:
    return {task["register"] for _, task in role_tasks(role) if "register" in task}


def what_is_read_is_registered(role: Path) -> list[str]:
    """No result is read whose task has gone. Some are those of a role that is included."""
    registered = registered_by(role).union(*map(registered_by, ROLES))
    return [
        f"{path.relative_to(role)}: {name} is registered nowhere"
        for path in sorted([*role.rglob("*.yml"), *role.rglob("*.j2")])
        for name in sorted(set(re.findall(r"\b__[a-z]\w+", path.read_text())) - registered)
    ]


def facts_are_not_injected(role: Path) -> list[str]:
    return [
        f"{path.relative_to(role)}: {match[0]}"
        for path in sorted([*role.rglob("*.yml"), *role.rglob("*.j2")])
        for match in INJECTED_FACT.finditer(path.read_text())
    ]


def other_roles_are_left_alone(role: Path) -> list[str]:
    """Roles meet in the inventory: none names a variable of another, unless it hands it in.

    A role that includes another one sets that one's variables under `vars:`, which is a call with
    arguments and not a hidden bond.
    """
    found = []
    others = {
        name: other.name for other in ROLES if other.name != role.name for name in options(other)
    }
    for path in sorted([*role.rglob("*.yml"), *role.rglob("*.j2")]):
        for name in sorted(set(re.findall(r"[a-z]\w*", path.read_text())) & set(others)):
            handed_in = any(
                name in task.get("vars", {})
                for task in tasks(load(path) if path.parent.name == "tasks" else [])
                if (module(task) or "").endswith("_role")
            )
            if not handed_in:
                found.append(f"{path.relative_to(role)}: {name} belongs to {others[name]}")
    return found


def preflight(role: Path) -> str:
    path = role / "tasks/preflight.yml"
    return path.read_text() if path.exists() else ""


def units_are_told_only_what_was_checked(role: Path) -> list[str]:
    """Text in a unit is escaped, or a preflight refuses what systemd would take for its own."""
    free = {
        name
        for name, spec in options(role).items()
        if spec.get("type") in {"str", "path", "list", "dict", "raw"} and "choices" not in spec
    }
    return [
        f"{path.relative_to(role)}: {name} is neither escaped nor checked"
        for path in sorted(role.glob("templates/*.j2"))
        if path.name.endswith((".service.j2", ".timer.j2")) or "[Service]" in path.read_text()
        for expression in re.findall(r"{{.*?}}", path.read_text(), re.DOTALL)
        if "replace('%', '%%')" not in expression
        for name in sorted(free & set(re.findall(r"\w+", expression)))
        if name not in preflight(role)
    ]


def passwords_are_text(role: Path) -> list[str]:
    """YAML takes digits for a number, which has no length and may be another one than was meant."""
    checks = [t for _, t in role_tasks(role) if t.get("name") == "Check that passwords are text"]
    return [
        f"{name}: nothing tells that it must be text"
        for name in options(role)
        if name.endswith(("_password", "_passphrase", "_set_key"))
        if f"{name} is not string" not in str(checks)
    ]


RULES: list[Rule] = [
    files_are_there,
    every_option_has_its_default,
    defaults_equal_the_specs,
    defaults_have_their_type,
    options_are_documented,
    names_carry_the_role,
    main_is_a_table_of_contents,
    modules_are_builtin_or_ours,
    network_tasks_are_retried,
    packages_come_by_one_role,
    what_is_read_is_registered,
    facts_are_not_injected,
    other_roles_are_left_alone,
    units_are_told_only_what_was_checked,
    passwords_are_text,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_role(role: Path, rule: Rule) -> None:
    assert rule(role) == []


BREACHES: list[tuple[Rule, dict[str, str], str]] = [
    (files_are_there, {"defaults/main.yml": ""}, "meta/main.yml is missing"),
    (
        every_option_has_its_default,
        {"meta/argument_specs.yml": "argument_specs: {main: {options: {bad_x: {type: str}}}}"},
        "bad_x: in the specs",
    ),
    (every_option_has_its_default, {"defaults/main.yml": "bad_y: 1"}, "bad_y: in defaults"),
    (
        defaults_equal_the_specs,
        {
            "defaults/main.yml": "bad_x: 1",
            "meta/argument_specs.yml": "argument_specs: {main: {options: {bad_x: {default: 2}}}}",
        },
        "bad_x: defaults 1, specs 2",
    ),
    (
        defaults_have_their_type,
        {
            "defaults/main.yml": "bad_x: true",
            "meta/argument_specs.yml": "argument_specs: {main: {options: {bad_x: {type: int}}}}",
        },
        "bad_x: True is no int",
    ),
    (
        options_are_documented,
        {
            "meta/argument_specs.yml": "argument_specs: {main: {options: {bad_wait: {type: int, "
            "description: How long to wait.}}}}"
        },
        "bad_wait: the description names no unit",
    ),
    (
        names_carry_the_role,
        {"tasks/run.yml": "[{ansible.builtin.command: id, register: result}]"},
        "registers result",
    ),
    (
        main_is_a_table_of_contents,
        {"tasks/main.yml": "[{name: Do, ansible.builtin.command: id}]"},
        "Do: main.yml only",
    ),
    (
        main_is_a_table_of_contents,
        {"tasks/main.yml": "[{name: Go, ansible.builtin.include_tasks: gone.yml}]"},
        "Go: tasks/gone.yml is missing",
    ),
    (
        modules_are_builtin_or_ours,
        {"tasks/run.yml": "[{block: [{name: Pipe, ansible.builtin.shell: a | b}]}]"},
        "Pipe: ansible.builtin.shell",
    ),
    (
        modules_are_builtin_or_ours,
        {"tasks/run.yml": "[{name: Fetch, community.general.maven_artifact: {}}]"},
        "needs a collection",
    ),
    (
        network_tasks_are_retried,
        {"tasks/run.yml": "[{name: Add, ansible.builtin.apt: {name: jq}}]"},
        "Add: goes over the network",
    ),
    (
        packages_come_by_one_role,
        {"tasks/run.yml": "[{name: Add, ansible.builtin.apt: {name: jq}}]"},
        "Add: let the role packages",
    ),
    (
        what_is_read_is_registered,
        {"tasks/run.yml": "[{name: Go, ansible.builtin.meta: noop, when: __bad_gone is changed}]"},
        "__bad_gone is registered nowhere",
    ),
    (
        facts_are_not_injected,
        {"templates/x.j2": "{{ ansible_distribution }} {{ ansible_facts['x'] }}"},
        "templates/x.j2: ansible_distribution",
    ),
    (
        other_roles_are_left_alone,
        {"templates/x.j2": "{{ kafka_resources_topics }}"},
        "kafka_resources_topics belongs to kafka_resources",
    ),
    (
        units_are_told_only_what_was_checked,
        {
            "meta/argument_specs.yml": "argument_specs: {main: {options: {bad_dir: {type: path}}}}",
            "templates/x.service.j2": "ReadWritePaths={{ bad_dir }}",
        },
        "bad_dir is neither escaped nor checked",
    ),
    (
        passwords_are_text,
        {"meta/argument_specs.yml": "argument_specs: {main: {options: {bad_password: {}}}}"},
        "bad_password: nothing tells",
    ),
]


@pytest.mark.parametrize("rule, files, breach", BREACHES, ids=lambda v: getattr(v, "__name__", ""))
def test_rule_finds_a_breach(
    tmp_path: Path, rule: Rule, files: dict[str, str], breach: str
) -> None:
    role = tmp_path / "bad"
    for name, text in files.items():
        (role / name).parent.mkdir(parents=True, exist_ok=True)
        (role / name).write_text(text)
    assert any(breach in found for found in rule(role))


def test_every_rule_was_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BREACHES} == set(RULES)
