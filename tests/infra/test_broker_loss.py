"""A broker is killed while images flow. Where there are three, nobody should notice for long."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from testinfra.host import Host

GROUP = "kafka_brokers"
IMAGES, INTERVAL = 1000, 0.02
PATIENCE_SECONDS = 120

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def brokers_are_whole(
    host: Host, topology: Any, variables: dict[str, Any], pytestconfig: pytest.Config
) -> Callable[[], None]:
    """Waits until no partition lacks a replica."""
    if not pytestconfig.getoption("drills"):
        pytest.skip("it kills brokers: ask for it with --drills")
    brokers = [node for node in topology.nodes.values() if GROUP in node.groups]
    if len(brokers) < 3:
        pytest.skip("with fewer than three brokers, the loss of one is an outage")

    def wait() -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            lacking = host.run(
                "systemctl is-active kafka && /opt/kafka/bin/kafka-topics.sh --describe "
                "--under-replicated-partitions --bootstrap-server=%s "
                "--command-config=/opt/kafka/config/admin.properties",
                variables["kafka_bootstrap_servers"],
            )
            if lacking.rc == 0 and lacking.stdout.strip() == "active":
                return
            assert time.monotonic() < until, lacking.stdout + lacking.stderr
            time.sleep(1)

    return wait


def test_images_flow_on_when_a_broker_is_killed(
    host: Host,
    node: Any,
    topology: Any,
    brokers_are_whole: Callable[[], None],
    audit: Any,
    run_script: Callable[..., Any],
) -> None:
    producer = topology.first("producers")
    brokers_are_whole()
    asked = {"count": IMAGES, "interval": INTERVAL, "source_name": f"loss-of-{node.name}"}
    with ThreadPoolExecutor(max_workers=1) as pool:
        sending = pool.submit(run_script, producer, "produce_and_watch.py", asked)
        time.sleep(IMAGES * INTERVAL / 4)
        host.check_output("systemctl kill --signal=SIGKILL kafka")
        sent = sending.result()
    assert sent["status"] == 0, sent["said"]
    print(f"{node.name} killed: no image was confirmed for {sent['longest_pause']:.1f} s at most")

    seen = audit.wait(IMAGES, 90)
    assert seen["produced"] >= IMAGES
    assert (seen["pending"], seen["missing"], seen["duplicated"]) == (0, 0, 0)
    assert seen["stored"] == seen["predicted"] == seen["produced"]
    brokers_are_whole()
