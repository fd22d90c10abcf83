"""The arithmetic of the benchmark: what samples and repetitions say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Sample = Mapping[str, Any]
"""What tests/bench/units.py takes at a moment: `at` in seconds, `machine` as busy and all CPU
seconds of the machine, and `units`, each unit's metrics by series."""

PARTS = ("poll", "decode", "model", "handle", "deliver", "kafka", "other")
"""What the CPU seconds of inference are split into; `model` is what the engine's threads took."""

RECORDS_OUT = "iot_records_out_total"
PROCESS_CPU = "process_cpu_seconds_total"
THREAD_CPU = "iot_cpu_seconds_total"
RESIDENT = "process_resident_memory_bytes"

DIGITS = 4


class TooShortError(ValueError):
    """There is nothing between the first and the last sample of a run."""


def significant(value: float, digits: int = DIGITS) -> float:
    """Return a value rounded to so many significant digits, as a whole number where it is one."""
    if not math.isfinite(value) or value == 0:
        return value
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    return int(rounded) if rounded == int(rounded) else rounded


def summary(repetitions: Iterable[float]) -> dict[str, Any]:
    """Return median and spread of repetitions, with the repetitions themselves."""
    values = [significant(value) for value in repetitions]
    return {
        "median": significant(statistics.median(values)),
        "min": min(values),
        "max": max(values),
        "repetitions": values,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not below `share` (0 to 1) of the values: nearest rank.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 of values."""
    return {
        name: significant(percentile(values, share))
        for name, share in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99))
    }


def total(metrics: Mapping[str, float], name: str, label: str = "") -> float:
    """Return the sum of a metric's series whose labels hold `label`, such as `part="poll"`."""
    return sum(
        value
        for series, value in metrics.items()
        if series.partition("{")[0] == name and label in series
    )


def everywhere(sample: Sample, name: str, label: str = "") -> float:
    """Return the sum of a metric over the units of a sample."""
    return sum(total(metrics, name, label) for metrics in sample["units"].values())


def steady(samples: Sequence[Sample], goal: float) -> tuple[Sample, Sample]:
    """Return the first and the last sample of the time in which all units were at work.

    It begins when each unit has delivered something, and ends before `goal` records were
    delivered: after that they may have had nothing to do.

    Raises:
        TooShortError: nothing was delivered between two samples in that time.
    """
    working = [
        sample
        for sample in samples
        if all(total(metrics, RECORDS_OUT) > 0 for metrics in sample["units"].values())
        and everywhere(sample, RECORDS_OUT) < goal
    ]
    if not working or everywhere(working[0], RECORDS_OUT) == everywhere(working[-1], RECORDS_OUT):
        raise TooShortError("too few for a steady state: give more with --images and --records")
    return working[0], working[-1]


def rate(first: Sample, last: Sample) -> float:
    """Return records delivered per second between two samples, by all units together."""
    delivered = everywhere(last, RECORDS_OUT) - everywhere(first, RECORDS_OUT)
    return float(delivered / (last["at"] - first["at"]))


def cpu_split(first: Sample, last: Sample) -> dict[str, float]:
    """Return CPU milliseconds per delivered record: `all`, and by the parts of PARTS.

    The engine computes in threads of its own, which Python does not know. What the process used
    beyond the sum of its threads was used by threads that ended; it counts as `other`.
    """
    records = everywhere(last, RECORDS_OUT) - everywhere(first, RECORDS_OUT)

    def used(name: str, label: str = "") -> float:
        seconds = everywhere(last, name, label) - everywhere(first, name, label)
        return float(seconds / records * 1000)

    split = {
        part: used(THREAD_CPU, f'part="{"native" if part == "model" else part}"')
        for part in PARTS
        if part != "other"
    }
    everything = used(PROCESS_CPU)
    split["other"] = max(0.0, everything - sum(split.values()))
    return {"all": everything, **split}


def mean_batch(first: Sample, last: Sample) -> float:
    """Return how many records a batch had on average between two samples."""
    records, batches = (
        everywhere(last, name) - everywhere(first, name)
        for name in ("iot_batch_size_records_sum", "iot_batch_size_records_count")
    )
    return float(records / batches) if batches else math.nan


def cores_used(first: Sample, last: Sample) -> float:
    """Return how many cores the units kept busy between two samples."""
    seconds = everywhere(last, PROCESS_CPU) - everywhere(first, PROCESS_CPU)
    return float(seconds / (last["at"] - first["at"]))


def machine_busy(first: Sample, last: Sample) -> float:
    """Return the share of the machine's CPU time (0 to 1) that was used between two samples."""
    busy, whole = (last["machine"][key] - first["machine"][key] for key in ("busy", "all"))
    return float(busy / whole) if whole else math.nan


def resident_mb(samples: Sequence[Sample], warm_up: float, counted: float) -> dict[str, float]:
    """Return the resident memory of the units of a run in MB (10^6 bytes), by its progress.

    `fresh` is the first sample with a record. `start` comes after `warm_up` records, since caches
    and buffers fill first; `half` and `end` lie between it and `counted` records more; `peak` is
    the most of all samples. A producer ends by itself, so its last sample may miss its last
    records.

    Raises:
        TooShortError: the run did not come half way.
    """

    def after(records: float) -> float:
        for sample in samples:
            if everywhere(sample, RECORDS_OUT) >= records:
                return everywhere(sample, RESIDENT) / 1e6
        raise TooShortError(f"the run ended before {records:.0f} records")

    found = {
        "fresh": after(1),
        "start": after(warm_up),
        "half": after(warm_up + counted / 2),
        "end": everywhere(samples[-1], RESIDENT) / 1e6,
        "peak": max(everywhere(sample, RESIDENT) for sample in samples) / 1e6,
    }
    return {name: significant(value) for name, value in found.items()}


def ratios(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the ratios that the measured parts allow, each a summary of its repetitions.

    Both sides of a repetition are measured one right after the other. A shared machine is faster at
    one time than at another, for both alike, so their ratio differs less than the ratio of two
    medians does.
    """
    made: dict[str, dict[str, Any]] = {}

    def put(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        try:
            pairs = zip(ours()["repetitions"], theirs()["repetitions"], strict=True)
            made[name] = summary(significant(one / other, 3) for one, other in pairs)
        except KeyError:
            return  # A part that this needs was not measured.

    def ceiling(role: str) -> Mapping[str, Any]:
        engine = found["engines"][role]
        by_batch: Mapping[str, Any] = found["ceiling"][engine]["images_per_second"]
        return by_batch

    def best(role: str) -> Any:
        return max(ceiling(role).values(), key=lambda entry: float(entry["median"]))

    def full_batch(role: str) -> Any:
        return ceiling(role)[str(found["settings"]["inference"]["IOT_MAX_BATCH_SIZE"])]

    def drain(role: str) -> Any:
        return found["inference"][found["engines"][role]]["images_per_second"]

    put("inference_of_ceiling_torch", lambda: drain("eager"), lambda: full_batch("eager"))
    put("inference_of_ceiling_default", lambda: drain("default"), lambda: full_batch("default"))
    put("engine_vs_eager_b1", lambda: ceiling("default")["1"], lambda: ceiling("eager")["1"])
    put("engine_vs_eager_best", lambda: best("default"), lambda: best("eager"))
    put(
        "storage_of_bulk_docs",
        lambda: found["storage"]["documents_per_second"],
        lambda: found["storage"]["bulk_docs_per_second"],
    )
    put(
        "producer_of_perf_test",
        lambda: found["producer"]["records_per_second"],
        lambda: found["producer"]["perf_test_records_per_second"],
    )
    put(
        "producer_tls_of_plaintext",
        lambda: found["tls"]["tls"]["records_per_second"],
        lambda: found["tls"]["plaintext"]["records_per_second"],
    )
    put(
        "inference_vs_baseline",
        lambda: drain("default"),
        lambda: found["baseline"]["inference_images_per_second"],
    )
    return made


def add_ratios(found: dict[str, Any]) -> None:
    """Put the ratios' medians into `found` as `ratios`, and their spread beside them."""
    made = ratios(found)
    found["ratios"] = {name: entry["median"] for name, entry in made.items()}
    found["ratio_repetitions"] = {name: entry["repetitions"] for name, entry in made.items()}
