from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from iot_lab.bench import figures, measure, page
from iot_lab.shell import LabError
from iot_pipeline import processor, produce

FACTS = Path(__file__).parents[1] / "bench" / "facts.py"
DOCS = Path(__file__).parents[2] / "docs"


def sample(at: float, *delivered: float, **metrics: float) -> figures.Sample:
    """A sample of as many units as counts are given; the metrics are those of each."""
    units = {
        f"unit-{number}": {'iot_records_out_total{sink="s"}': count, **metrics}
        for number, count in enumerate(delivered)
    }
    return {"at": at, "machine": {"busy": at * 1.5, "all": at * 2}, "units": units}


def test_significant() -> None:
    assert figures.significant(1234.56) == 1235
    assert isinstance(figures.significant(1234.56), int)
    assert figures.significant(0.0123456) == 0.01235
    assert figures.significant(0.98765, 2) == 0.99
    assert figures.significant(0) == 0
    assert math.isnan(figures.significant(math.nan))


def test_summary_has_median_spread_and_repetitions() -> None:
    assert figures.summary([30, 10, 20]) == {
        "median": 20,
        "min": 10,
        "max": 30,
        "repetitions": [30, 10, 20],
    }
    assert figures.summary([10, 20])["median"] == 15


def test_percentile_is_a_value_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert figures.percentiles(values[::-1]) == {"p50": 50, "p95": 95, "p99": 99}
    assert figures.percentile([7.0], 0.99) == 7
    assert figures.percentile([1.0, 2.0], 0.5) == 1
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


def test_total_sums_the_series_of_one_metric() -> None:
    metrics = {
        'iot_cpu_seconds_total{part="poll"}': 1.0,
        'iot_cpu_seconds_total{part="decode"}': 2.0,
        'iot_cpu_seconds_totally{part="poll"}': 4.0,
        "process_cpu_seconds_total": 8.0,
    }
    assert figures.total(metrics, "iot_cpu_seconds_total") == 3
    assert figures.total(metrics, "iot_cpu_seconds_total", 'part="poll"') == 1
    assert figures.total(metrics, "process_cpu_seconds_total") == 8


def test_steady_state_begins_when_all_units_work_and_ends_before_the_goal() -> None:
    samples = [
        sample(0, 0, 0),
        sample(1, 50, 0),
        sample(2, 100, 10),
        sample(3, 200, 110),
        sample(9, 290, 210),
    ]
    first, last = figures.steady(samples, goal=500)
    assert (first["at"], last["at"]) == (2, 3)
    assert figures.rate(first, last) == 200
    assert figures.machine_busy(first, last) == 0.75


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(figures.TooShortError, match="--images"):
        figures.steady([sample(0, 0), sample(1, 5), sample(2, 10)], goal=10)


def test_cpu_is_split_by_what_the_threads_do() -> None:
    def taken(at: float, images: float, poll: float, native: float, whole: float) -> figures.Sample:
        unit = {
            'iot_records_out_total{sink="s"}': images,
            'iot_cpu_seconds_total{part="poll"}': poll,
            'iot_cpu_seconds_total{part="native"}': native,
            'iot_cpu_seconds_total{part="other"}': 99.0,
            "process_cpu_seconds_total": whole,
        }
        return {"at": at, "machine": {"busy": 0, "all": 0}, "units": {"a": unit}}

    first, last = taken(10, 100, 1, 5, 7), taken(14, 1100, 2, 8, 13)
    split = figures.cpu_split(first, last)
    assert split["all"] == pytest.approx(6)
    assert split["poll"] == pytest.approx(1)
    assert split["model"] == pytest.approx(3)
    assert split["decode"] == 0
    assert split["other"] == pytest.approx(2)
    assert sum(split[part] for part in figures.PARTS) == pytest.approx(split["all"])
    assert figures.cores_used(first, last) == pytest.approx(1.5)


def test_memory_is_told_by_progress() -> None:
    samples = [
        sample(at, count, process_resident_memory_bytes=resident)
        for at, count, resident in [
            (0, 0, 90e6),
            (1, 60, 95e6),
            (2, 240, 100e6),
            (3, 600, 140e6),
            (4, 800, 110e6),
            (5, 1200, 105e6),
        ]
    ]
    found = figures.resident_mb(samples, 200, 1000)
    assert found == {"fresh": 95, "start": 100, "half": 110, "end": 105, "peak": 140}
    with pytest.raises(figures.TooShortError):
        figures.resident_mb(samples[:4], 200, 1000)


def test_the_tool_sends_batches_like_the_producers() -> None:
    ours = {"batch.size": produce.BATCH_SIZE, "linger.ms": produce.LINGER_MS}
    assert ours == measure.PRODUCER_BATCHES


def test_perf_test_is_read_after_its_warm_up() -> None:
    said = (
        "10000 records sent, 5000.0 records/sec (14.9 MB/sec), 2.0 ms avg latency\n"
        "60000 records sent, 9000.5 records/sec (20.0 MB/sec), 3.1 ms avg latency, 1 ms 50th\n"
        "48000 steady state records sent, 12000.25 records/sec (30.1 MB/sec), 2.9 ms avg latency\n"
    )
    assert measure.steady_rate(said) == 12000.25
    with pytest.raises(LabError, match="no rate"):
        measure.steady_rate("Error: no broker")


@pytest.fixture
def found() -> dict[str, Any]:
    def each(value: float) -> dict[str, Any]:
        return figures.summary([value, value * 1.1, value * 0.9])

    def drained(value: float) -> dict[str, Any]:
        return {
            "images_per_second": each(value),
            "cpu_ms_per_image": {name: each(0.5) for name in ("all", *figures.PARTS)},
            "batch": each(30),
            "cores_used": each(1.5),
            "machine_busy": each(0.9),
        }

    scaled = {
        "images_per_second": each(900),
        "cpu_ms_per_image": {"apps": each(1), "broker": each(0.1)},
        "cores_used_by_apps": each(1.7),
        "cores_used_by_broker": each(0.1),
        "machine_busy": each(0.99),
    }
    made: dict[str, Any] = {
        "made": {"at": "2026-01-02T03:04:05+00:00", "command": "make bench", "minutes": 20.5},
        "machine": {
            "processor": "A processor",
            "cores": 2,
            "instructions": ["avx2"],
            "memory_gb": 8,
            "host_cores": {"producer": 1, "broker": 2, "inference": 2, "storage": 1},
            "kernel": "6.1",
        },
        "versions": {"inference": {"python": "3.13"}},
        "engines": {"eager": "torch fp32", "default": "openvino int8"},
        "model": "resnet18@0123456789ab",
        "settings": {
            "producer": {"IOT_COMPRESSION": "lz4"},
            "inference": {"IOT_MAX_BATCH_SIZE": 32, "IOT_THREADS": 2},
            "storage": {"IOT_MAX_BATCH_SIZE": 500},
            "bench": {
                "images": 20000,
                "producer_records": 60000,
                "repetitions": 3,
                "tool_warm_up": 9,
            },
        },
        "ceiling": {
            "torch fp32": {
                "images_per_second": {"1": each(60), "32": each(300)},
                "cpu_ms_per_image": {"1": each(20), "32": each(4)},
            },
            "openvino int8": {
                "images_per_second": {"1": each(600), "32": each(1500)},
                "cpu_ms_per_image": {"1": each(1), "32": each(0.8)},
            },
        },
        "inference": {"torch fp32": drained(285), "openvino int8": drained(900)},
        "baseline": {
            "inference_images_per_second": each(50),
            "storage_messages_per_second": each(100),
        },
        "storage": {
            "documents_per_second": each(1800),
            "bulk_docs_per_second": each(2000),
            "cpu_ms_per_document": {"all": each(0.3), "decode": each(0.1), "database": each(0.2)},
            "bulk_docs_cpu_ms_per_document": {"all": each(0.05), "database": each(0.2)},
        },
        "record_bytes": 3000,
        "producer": {
            "records_per_second": each(5000),
            "perf_test_records_per_second": each(20000),
            "perf_test_large_batches_records_per_second": each(40000),
            "perf_test_uncompressed_records_per_second": each(30000),
        },
        "tls": {
            side: {
                "records_per_second": each(rate),
                "producer_cpu_us": each(45),
                "broker_cpu_us": each(10),
                "login_ms": each(3),
            }
            for side, rate in (("plaintext", 20000), ("tls", 18000))
        },
        "latency_ms": {
            pace: {"p50": 20, "p95": 40, "p99": 60, "images": 100} for pace in ("1", "10", "50")
        },
        "scaling": {"1": scaled, "2": scaled, "4": scaled},
        "memory_mb": {
            "images": 100000,
            "warm_up": 20000,
            **{
                role: {"fresh": 90, "start": 100, "half": 101, "end": 102, "peak": 110}
                for role in ("producer", "inference", "storage")
            },
        },
    }
    figures.add_ratios(made)
    return made


def test_ratios(found: dict[str, Any]) -> None:
    assert found["ratios"] == {
        "inference_of_ceiling_torch": 0.95,
        "inference_of_ceiling_default": 0.6,
        "engine_vs_eager_b1": 10,
        "engine_vs_eager_best": 5,
        "storage_of_bulk_docs": 0.9,
        "producer_of_perf_test": 0.25,
        "producer_tls_of_plaintext": 0.9,
        "inference_vs_baseline": 18,
    }


def test_a_ratio_is_taken_within_each_repetition(found: dict[str, Any]) -> None:
    found["storage"] = {
        "documents_per_second": figures.summary([90, 180, 40]),
        "bulk_docs_per_second": figures.summary([100, 200, 50]),
    }
    assert figures.ratios(found)["storage_of_bulk_docs"]["repetitions"] == [0.9, 0.9, 0.8]


def test_ratios_of_what_was_not_measured_are_left_out(found: dict[str, Any]) -> None:
    del found["baseline"], found["ceiling"]["torch fp32"]
    assert figures.ratios(found).keys() == {
        "inference_of_ceiling_default",
        "storage_of_bulk_docs",
        "producer_of_perf_test",
        "producer_tls_of_plaintext",
    }


def test_bars_say_what_is_met(found: dict[str, Any]) -> None:
    missed = [bar.what for bar in page.bars(found) if not bar.met]
    assert len(page.bars(found)) == 12
    assert missed == [
        "Inference drain to ceiling, openvino int8 (`inference_of_ceiling_default`)",
        "Producer to `kafka-producer-perf-test.sh` (`producer_of_perf_test`)",
    ]
    assert [bar.needed for bar in page.bars(found) if "without VNNI" in bar.what] == [
        "at least 5",
        "at least 2",
    ]
    found["memory_mb"]["storage"]["end"] = 150
    found["latency_ms"]["10"]["p99"] = 250
    assert len([bar for bar in page.bars(found) if not bar.met]) == 4


@pytest.mark.parametrize("vnni", ["avx_vnni", "avx512_vnni"])
def test_engines_are_judged_by_what_the_processor_has(found: dict[str, Any], vnni: str) -> None:
    figures.add_ratios(found)
    without = [bar.what for bar in page.bars(found) if not bar.met]
    found["ratios"] |= {"engine_vs_eager_b1": 6, "engine_vs_eager_best": 3}
    assert [bar.what for bar in page.bars(found) if not bar.met] == without
    found["machine"]["instructions"].append(vnni)
    judged = {bar.what: bar for bar in page.bars(found) if "with VNNI" in bar.what}
    assert [(bar.needed, bar.met) for bar in judged.values()] == [
        ("at least 8", False),
        ("at least 4", False),
    ]


def test_the_hosts_are_asked_for_the_same_instructions_as_the_apps_look_for() -> None:
    assert runpy.run_path(str(FACTS))["INSTRUCTIONS"] == processor.INSTRUCTIONS


def test_the_page_shows_the_figures(found: dict[str, Any]) -> None:
    text = page.render(found)
    for shown in (
        "900 (810 to 990)",
        "| 10 | 100 | 20.0 | 40.0 | 60.0 |",
        "**no**",
        "2 cores",
        "2,000 documents/s at",
    ):
        assert shown in text
    assert "nan" not in text
    assert "A remark." in page.render({**found, "notes": ["A remark."]})


@pytest.mark.parametrize(
    "part",
    ["ceiling", "inference", "baseline", "storage", "producer", "tls", "latency_ms", "scaling"],
)
def test_a_page_of_some_parts(found: dict[str, Any], part: str) -> None:
    del found[part]
    figures.add_ratios(found)
    assert page.render(found).startswith("# Benchmarks")


def test_the_page_in_the_repository_is_made_from_its_figures() -> None:
    found = json.loads((DOCS / "benchmarks.json").read_text())
    assert (DOCS / "benchmarks.md").read_text() == page.render(found)
    assert found["failures"] == {}
    made = figures.ratios(found)
    assert found["ratios"] == {name: entry["median"] for name, entry in made.items()}
    assert found["latency_ms"].keys() == {"1", "10", "50"}
    for name in ("engines", "latency"):
        assert (DOCS / "images" / f"{name}.svg").read_text().startswith("<?xml")
