"""What dies comes back, and nothing is lost nor stored twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kafka.future import Future
from kafka.protocol.metadata import MetadataRequest

from iot_lab.paths import ROOT
from iot_lab.processes import Pipeline, Process, wait_for
from iot_pipeline.errors import Exit, SinkUnavailable
from iot_pipeline.kafka import Sender
from iot_pipeline.settings import ProduceSettings, load


def wait_for_images(pipeline: Pipeline, count: int) -> None:
    wait_for(lambda: pipeline.produced() >= count, f"{count} images")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("server", ["database", "mongodb"])
def test_each_part_killed_while_500_images_flow(
    request: pytest.FixtureRequest,
    server: str,
    make_pipeline: Callable[..., Pipeline],
    assert_clean: Callable[[Pipeline, int], None],
) -> None:
    with make_pipeline(request.getfixturevalue(server)) as pipeline:
        infer, store = pipeline.infer().start(), pipeline.store().start()
        for worker in (infer, store):
            worker.wait_ready()
        producer = pipeline.produce("--interval", "0.1").start().wait_ready()
        victims: list[Process] = [infer, store, pipeline.database, pipeline.broker]
        for number, victim in enumerate(victims, start=1):
            wait_for_images(pipeline, 60 * number)
            before = victim.pid
            victim.kill()
            assert not victim.running
            victim.start().wait_ready()
            assert victim.pid != before
        wait_for_images(pipeline, 500)
        assert producer.stop() == 0, producer.output()
        assert_clean(pipeline, len({r.key for r in pipeline.broker.records(pipeline.image_topic)}))
        for worker in (infer, store):
            assert worker.running, worker.error("ended")


@pytest.mark.timeout(300)
def test_each_part_ends_in_time_when_nothing_answers(pipeline: Pipeline) -> None:
    unit = (ROOT / "roles/pipeline_app/templates/service.j2").read_text()
    allowed = int(unit.partition("TimeoutStopSec=")[2].split()[0])
    apps = [pipeline.infer().start(), pipeline.store().start()]
    for app in apps:
        app.wait_ready()
    apps.append(pipeline.produce("--interval", "0.02").start().wait_ready())
    wait_for_images(pipeline, 50)
    servers = [pipeline.broker.pid, pipeline.database.pid]
    for pid in servers:
        assert pid
        os.kill(pid, signal.SIGSTOP)
    try:
        # Fifty images a second: by then one waits for an answer.
        time.sleep(3)
        with ThreadPoolExecutor() as pool:
            ended = list(pool.map(lambda app: app.stop(timeout=allowed), apps))
    finally:
        for pid in servers:
            assert pid
            os.kill(pid, signal.SIGCONT)
    assert ended == [Exit.OK, Exit.OK, Exit.UNREACHABLE]


def test_two_inference_workers_share_the_work_and_one_may_leave(
    pipeline: Pipeline, assert_clean: Callable[[Pipeline, int], None]
) -> None:
    # Members without a name: one that has a name is waited for when it leaves, as it may restart.
    nameless = ("--group-instance-id", "")
    pipeline.store().start()
    first = pipeline.infer(*nameless).start().wait_ready()
    producer = pipeline.produce("--interval", "0.05").start().wait_ready()
    wait_for(lambda: "classified" in first.output(), "the first worker to work")
    second = pipeline.infer(*nameless).start().wait_ready()
    wait_for(lambda: "classified" in second.output(), "the second worker to work")
    seen = first.output().count("classified")
    wait_for(lambda: first.output().count("classified") > seen, "the first to go on")
    assert first.stop() == 0
    images = pipeline.produced()
    wait_for(lambda: pipeline.produced() > images + 20, "images after it left")
    assert producer.stop() == 0
    assert_clean(pipeline, pipeline.produced())


def test_a_client_that_gave_a_record_up_is_replaced(pipeline: Pipeline) -> None:
    # With two brokers of three away for a minute, such a client never sent to a partition again.
    flags = {"bootstrap_servers": pipeline.broker.bootstrap_servers, "source": "sample"}
    sender = Sender(load(ProduceSettings, flags, {}), delivery_timeout_ms=11_000)

    def delivered() -> bool:
        sender.send(pipeline.image_topic, b"key", b"{}")
        try:
            sender.confirm(lambda: None)
        except SinkUnavailable:
            return False
        return True

    assert delivered()
    first, broker = sender._producer, pipeline.broker.pid
    assert broker
    os.kill(broker, signal.SIGSTOP)
    try:
        assert not delivered()
    finally:
        os.kill(broker, signal.SIGCONT)
    wait_for(delivered, "the broker to take it")
    assert sender._producer is not first
    sender.close()


def test_a_client_asks_for_the_brokers_again_whatever_went_wrong(pipeline: Pipeline) -> None:
    # A broker that was killed within the handshake left producers with the leaders of before.
    flags = {"bootstrap_servers": pipeline.broker.bootstrap_servers, "source": "sample"}
    sender = Sender(load(ProduceSettings, flags, {}))
    sender.send(pipeline.image_topic, b"key", b"{}")
    sender.confirm(lambda: None)
    metadata = sender._producer._metadata
    manager, send = metadata._manager, metadata._manager.send
    refused: list[MetadataRequest] = []

    def refuse_once(request: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(request, MetadataRequest) and not refused:
            refused.append(request)
            return Future().failure(ConnectionResetError(104, "Connection reset by peer"))
        return send(request, *arguments, **options)

    manager.send = refuse_once
    metadata.request_update()
    wait_for(lambda: refused, "the client to ask")
    asked = metadata._last_successful_refresh_ms
    metadata.request_update()
    wait_for(lambda: metadata._last_successful_refresh_ms > asked, "it to ask again")
    sender.close()
