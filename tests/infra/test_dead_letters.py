"""Dead letters, as the person on call handles them on a storage host."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

PYTHON = "/opt/iot-pipeline/current/bin/python"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def listed(storage: Host, *words: str) -> list[dict[str, Any]]:
    """Those of the names that are there."""
    done = storage.run("iot-pipeline dead-letters list --json " + " ".join(words))
    return [json.loads(line) for line in done.stdout.splitlines()]


# Who refuses which: storage looks at the message, inference at the image too.
BOTH = {"iot-inference", "iot-storage"}
STAGES = dict.fromkeys(("invalid-json", "missing-field", "invalid-base64"), BOTH)


def wait_for_letters(storage: Host, expected: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """The open ones of some keys, once there is one of each key and stage that is expected."""
    until = time.monotonic() + 60
    while True:
        found = listed(storage, *{key for key, _ in expected})
        if {(each["key"], each["stage"]) for each in found} == expected:
            return found
        assert time.monotonic() < until, found
        time.sleep(1)


def test_broken_records_are_listed_shown_replayed_and_dropped(
    topology: Any, audit: Any, run_script: Callable[..., Any]
) -> None:
    producer, storage = topology.first("producers"), topology.first("storage_nodes")
    before = topology.services()
    sent = run_script(producer, "send_broken_records.py", {}, PYTHON)
    keys = {record["key"]: reason for reason, record in sent.items()}
    found = wait_for_letters(
        storage,
        {
            (key, stage)
            for key, reason in keys.items()
            for stage in STAGES.get(reason, {"iot-inference"})
        },
    )
    assert {letter["key"]: letter["reason"] for letter in found} == keys
    broken = sent["invalid-json"]
    assert broken["key"] in {each["key"] for each in listed(storage, "--reason", "invalid-json")}
    assert broken["key"] not in {each["key"] for each in listed(storage, "--until", "1h")}
    shown = storage.check_output("iot-pipeline dead-letters show %s", broken["key"])
    assert "invalid-json" in shown
    assert broken["value"] in shown

    # What is replayed though its cause is not gone comes back.
    old = {letter["position"] for letter in listed(storage, broken["key"])}
    storage.check_output("iot-pipeline dead-letters replay --yes %s", broken["key"])
    new = wait_for_letters(storage, {(broken["key"], stage) for stage in BOTH})
    assert not old & {letter["position"] for letter in new}
    handled = listed(storage, "--all", *old)
    assert {letter["state"] for letter in handled} == {"replayed"}
    assert all(letter["handled_by"] for letter in handled)

    storage.check_output("iot-pipeline dead-letters drop --yes " + " ".join(keys))
    assert not listed(storage, *keys)
    seen = audit.wait(0)
    assert (seen["missing"], seen["open_dead_letters"]) == (0, 0)
    assert seen["dead_lettered"] == len(sent) + 1
    assert topology.services() == before, "a service was started anew over a broken record"


def test_a_replayed_image_whose_cause_is_gone_is_stored_once(
    topology: Any, audit: Any, run_script: Callable[..., Any]
) -> None:
    storage = topology.first("storage_nodes")
    key = run_script(storage, "bury_good_image.py", {}, PYTHON)["id"]
    shown = storage.check_output("iot-pipeline dead-letters replay --dry-run %s", key)
    assert "refused-by-database 1" in shown
    storage.check_output("iot-pipeline dead-letters replay --yes %s", key)
    seen = audit.wait(1)
    assert seen["stored"] == seen["predicted"] == seen["produced"] >= 1
    assert (seen["missing"], seen["duplicated"], seen["open_dead_letters"]) == (0, 0, 0)
    assert not listed(storage, key)
