"""docs/benchmarks.md and its plots, made from the figures in docs/benchmarks.json."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iot_lab.bench.figures import PARTS
from iot_lab.console import table

Found = Mapping[str, Any]

FLAT_MEMORY = 1.10  # end over start
"""From when on memory counts as growing: allocators and caches breathe by a few per cent."""

VNNI = {"avx_vnni", "avx512_vnni"}
"""Instructions, one of which the processor needs to add four products of bytes at once."""

MEMORY = ("fresh", "start", "half", "end", "peak")


@dataclass(frozen=True)
class Bar:
    """What the project wants of a figure."""

    what: str
    needed: str
    measured: str
    met: bool


def bars(found: Found) -> list[Bar]:
    """Return the bars that can be judged by what was measured."""
    made: list[Bar] = []

    def at_least(what: str, name: str, bar: float) -> None:
        value = found.get("ratios", {}).get(name)
        if value is not None:
            each = found["ratio_repetitions"][name]
            measured = f"{value:g} ({min(each):g} to {max(each):g})"
            made.append(Bar(f"{what} (`{name}`)", f"at least {bar:g}", measured, value >= bar))

    default = found["engines"]["default"]
    # Integers are what the default engine is fast with.
    has_vnni = not VNNI.isdisjoint(found["machine"]["instructions"])
    (alone, best), vnni = ((8, 4), "with VNNI") if has_vnni else ((5, 2), "without VNNI")
    at_least("Inference drain to ceiling, eager torch", "inference_of_ceiling_torch", 0.90)
    at_least(f"Inference drain to ceiling, {default}", "inference_of_ceiling_default", 0.65)
    at_least(f"{default} to eager torch, batch 1, {vnni}", "engine_vs_eager_b1", alone)
    at_least(
        f"{default} to eager torch, each at its best batch, {vnni}", "engine_vs_eager_best", best
    )
    at_least("Storage drain to bare `_bulk_docs` loop", "storage_of_bulk_docs", 0.80)
    at_least("Producer to `kafka-producer-perf-test.sh`", "producer_of_perf_test", 0.40)
    at_least("Producer over TLS to plaintext", "producer_tls_of_plaintext", 0.75)
    at_least("Inference drain to the plain consumer's", "inference_vs_baseline", 10)
    latency = found.get("latency_ms", {}).get("10")
    if latency:
        p99 = latency["p99"]
        made.append(Bar("p99 at 10 images/s", "under 250 ms", f"{p99:g} ms", p99 < 250))
    for role in ("producer", "inference", "storage"):
        memory = found.get("memory_mb", {}).get(role)
        if memory:
            start, end = memory["start"], memory["end"]
            images = found["memory_mb"]["images"]
            made.append(
                Bar(
                    f"Memory of the {role} app over {images:,} images",
                    f"flat (end at most {FLAT_MEMORY:g} of start)",
                    f"{start:g} to {end:g} MB",
                    end <= FLAT_MEMORY * start,
                )
            )
    return made


def bars_as_text(found: Found) -> str:
    """Return the bars as a table for a terminal."""
    rows = [
        (bar.what.replace("`", ""), bar.needed, bar.measured, "yes" if bar.met else "NO")
        for bar in bars(found)
    ]
    return table(["WHAT", "BAR", "MEASURED", "MET"], rows) if rows else "No bar was measured."


def write(file: Path) -> None:
    """Write the page and its plots beside a JSON file."""
    found: dict[str, Any] = json.loads(file.read_text())
    images = file.parent / "images"
    plots: list[tuple[str, Callable[[Found, Path], None]]] = []
    if "ceiling" in found:
        plots.append(("engines", _plot_engines))
    if "latency_ms" in found:
        plots.append(("latency", _plot_latency))
    for name, plot in plots:
        images.mkdir(exist_ok=True)
        plot(found, images / f"{name}.svg")
    file.with_suffix(".md").write_text(render(found))


def render(found: Found) -> str:
    """Return the page. Parts that were not measured are left out."""
    sections = [
        _head(found),
        _bars(found),
        _notes(found),
        _ceiling(found),
        _inference(found),
        _storage(found),
        _producer(found),
        _tls(found),
        _latency(found),
        _scaling(found),
        _memory(found),
        _machine(found),
        _commands(found),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """A Markdown table; the columns from `right` on are aligned to the right."""
    marks = ["---" if column < right else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def _prose(text: str) -> str:
    """A paragraph in lines of the page's width."""
    return textwrap.fill(
        " ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False
    )


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _spread(entry: Found, of: Callable[[float], str] = _number) -> str:
    """Median and, behind it, minimum to maximum."""
    return f"{of(entry['median'])} ({of(entry['min'])} to {of(entry['max'])})"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _head(found: Found) -> str:
    made, machine = found["made"], found["machine"]
    repetitions = found["settings"]["bench"]["repetitions"]
    how = f"""Made by `{made["command"]}` on {made["at"][:10]} in {made["minutes"]:g} minutes; the
figures are in [benchmarks.json](benchmarks.json). Each is the median of {repetitions} repetitions,
with the least and the greatest in parentheses. A ratio is taken in each repetition, whose two sides
are measured one after the other."""
    where = f"""The machine has {machine["cores"]} cores ({machine["processor"]}) and
{machine["memory_gb"]:g} GB of memory. **All four hosts share these cores**: broker, database and
apps take them from each other. On hosts of their own each stage has more. Ratios say more than
rates here."""
    more = "How long a deployment takes, and where, is in [deployment.md](deployment.md)."
    return f"# Benchmarks\n\n{_prose(how)}\n\n{_prose(f'{where} {more}')}"


def _bars(found: Found) -> str:
    judged = bars(found)
    if not judged:
        return ""
    rows = [(bar.what, bar.needed, bar.measured, "yes" if bar.met else "**no**") for bar in judged]
    return "## Bars\n\n" + _rows(["", "bar", "measured", "met"], rows)


def _notes(found: Found) -> str:
    """What a person wrote about these figures: `notes` in the JSON, a list of paragraphs."""
    return "\n\n".join(map(_prose, found.get("notes", ())))


def _ceiling(found: Found) -> str:
    if "ceiling" not in found:
        return ""
    engines = list(found["ceiling"])
    batches = list(found["ceiling"][engines[0]]["images_per_second"])
    rows = [
        [engine]
        + [_spread(found["ceiling"][engine]["images_per_second"][batch]) for batch in batches]
        for engine in engines
    ]
    header = ["images/s at batch", *batches]
    threads = found["settings"]["inference"]["IOT_THREADS"]
    text = f"""The classifier as it is installed on the inference host, model
`{found.get("model", "")}`, in the service's own environment with {threads} threads. Pixels in,
labels out: no Kafka, no decoding. The default engine is **{found["engines"]["default"]}**. The
accuracy of each engine is in [engines.md](engines.md)."""
    return f"""## The engine alone

{_prose(text)}

{_rows(header, rows)}

![Images per second by engine and batch size](images/engines.svg)"""


def _inference(found: Found) -> str:
    measured = found.get("inference", {})
    baseline = found.get("baseline")
    if not measured and not baseline:
        return ""
    rows = [
        [
            f"`iot-pipeline infer`, {engine}",
            _spread(entry["images_per_second"]),
            _number(entry["cpu_ms_per_image"]["all"]["median"]),
            _number(entry["batch"]["median"]),
            _percent(entry["machine_busy"]["median"]),
        ]
        for engine, entry in measured.items()
    ]
    if baseline:
        rate = baseline["inference_images_per_second"]
        rows.append(["the plain consumer, eager torch", _spread(rate), "", "1", ""])
    images = found["settings"]["bench"]["images"]
    header = ["", "images/s", "CPU ms an image", "images a batch", "machine busy"]
    text = f"""A backlog of {images:,} images in 4 partitions, classified by one worker. The rate is
that of the steady state: from the first of the app's own counters that is not zero to the last
before the backlog ends. The images are those of the producer's source
(`{found["settings"]["producer"].get("IOT_SOURCE", "")}`), over and over."""
    text = f"## Inference\n\n{_prose(text)}\n\n{_rows(header, rows)}"
    if measured:
        text += "\n\n" + _where_the_time_goes(found)
    if baseline:
        stored = _spread(baseline["storage_messages_per_second"])
        about = f"""The plain consumer is [tests/bench/baseline.py](../tests/bench/baseline.py):
kafka-python's defaults, automatic commits, one message at a time, a batch of one through eager
torch with the service's threads, no flush after each message. Its own storage stage, one document
at a time, takes {stored} messages/s: an image needs two."""
        text += f"\n\n{_prose(about)}"
    return text


def _where_the_time_goes(found: Found) -> str:
    measured: Mapping[str, Found] = found["inference"]
    ceiling: Mapping[str, Found] = found.get("ceiling", {})
    default = found["engines"]["default"]
    batch = str(found["settings"]["inference"]["IOT_MAX_BATCH_SIZE"])
    engines = list(measured)
    meaning = {
        "poll": "poll: Kafka's records into Python",
        "decode": "decode: JSON, base64, Pillow",
        "model": "model: the engine's own threads",
        "handle": "handle: the thread that calls the model",
        "deliver": "deliver: predictions to Kafka, commits",
        "kafka": "kafka: the clients' I/O threads",
        "other": "other",
    }
    rows = [
        [meaning[part]]
        + [_spread(measured[engine]["cpu_ms_per_image"][part]) for engine in engines]
        for part in PARTS
    ]
    all_of_it = [_spread(measured[engine]["cpu_ms_per_image"]["all"]) for engine in engines]
    rows.append(["**all**", *all_of_it])
    if all("cpu_ms_per_image" in ceiling.get(engine, {}) for engine in engines):
        alone = [_spread(ceiling[engine]["cpu_ms_per_image"][batch]) for engine in engines]
        rows.append([f"for comparison: the engine alone, batch {batch}", *alone])
    header = ["CPU milliseconds an image", *engines]
    text = "An engine also computes in the thread that calls it: model and handle belong together."
    if default in measured and default in ceiling:
        split = measured[default]["cpu_ms_per_image"]
        whole = split["all"]["median"]
        computing = split["model"]["median"] + split["handle"]["median"]
        cores = found["machine"]["host_cores"]["inference"]
        most = cores / whole * 1000
        share = most / ceiling[default]["images_per_second"][batch]["median"]
        text += f""" With {default} they take {_number(computing)} of {_number(whole)} ms. At
            {_number(whole)} ms an image, the host's {cores} cores can do {most:,.0f} images/s:
            {share:.2f} of the ceiling is the most that the drain can reach if nothing else runs
            on them. Here the broker does."""
    return f"### Where the CPU seconds go\n\n{_rows(header, rows)}\n\n{_prose(text)}"


# Not measured here, where the official server cannot be had.
WRITERS = """The official server, CouchDB 3.5.0, asks the function that refuses what readers write
(`_design/writers`) for each document. Elsewhere it took 3,605 documents/s without that function and
463 with it; its other JavaScript engine, `couchdb_js_engine: quickjs`, which the role sets, makes
that about twice as many. `couchdb_enforce_readers: false` does without:
[security.md](security.md#the-database) says what that gives away."""


def _storage(found: Found) -> str:
    storage = found.get("storage")
    if not storage:
        return ""
    documents = found["settings"]["bench"]["images"]
    batch = found["settings"]["storage"]["IOT_MAX_BATCH_SIZE"]
    rows = []
    if "documents_per_second" in storage:
        rows.append(["`iot-pipeline store`", _spread(storage["documents_per_second"])])
    if "bulk_docs_per_second" in storage:
        rows.append(["bare loop of `_bulk_docs`", _spread(storage["bulk_docs_per_second"])])
    server = found["versions"].get("storage", {}).get("database", "")
    text = f"""{documents:,} images and their predictions, from both topics into an empty database.
Against it a loop that has the same documents in memory and does nothing but write them, {batch} at
once, with one kept connection ([tests/bench/bulk_docs.py](../tests/bench/bulk_docs.py)). The
database is {server or "unknown"}."""
    parts = ["## Storage", _prose(text), _rows(["", "documents/s"], rows), _prose(WRITERS)]
    text = "\n\n".join(parts)
    split = storage.get("cpu_ms_per_document")
    bare = storage.get("bulk_docs_cpu_ms_per_document", {})
    if split:
        rows = [
            [part, _spread(entry), _spread(bare[part]) if part in bare else ""]
            for part, entry in split.items()
            if entry["median"] > 0
        ]
        rows = [["**all of the app**", *row[1:]] if row[0] == "all" else row for row in rows]
        text += "\n\n" + _rows(["CPU milliseconds a document", "app", "bare loop"], rows)
        whole = split["all"]["median"] + split["database"]["median"]
        cores = found["machine"]["host_cores"]["storage"]
        limit = f"""App and database share the storage host. Together they take {_number(whole)} ms
            of CPU a document: with the host's cores ({cores}) that is {cores / whole * 1000:,.0f}
            documents/s at most."""
        text += f"\n\n{_prose(limit)}"
    return text


def _producer(found: Found) -> str:
    producer = found.get("producer")
    if not producer:
        return ""
    settings = found["settings"]
    compression = settings["producer"].get("IOT_COMPRESSION", "none")
    rows = []
    if "records_per_second" in producer:
        rows.append(
            ["`iot-pipeline produce --interval 0`", _spread(producer["records_per_second"])]
        )
    for name, how in (
        ("perf_test", f"{compression}, its own batches"),
        ("perf_test_large_batches", f"{compression}, the app's batches"),
        ("perf_test_uncompressed", "no compression, its own batches"),
    ):
        measured = producer.get(f"{name}_records_per_second")
        if measured:
            rows.append([f"`kafka-producer-perf-test.sh`, {how}", _spread(measured)])
    cores = found["machine"]["host_cores"]
    records, warm_up = (settings["bench"][name] for name in ("producer_records", "tool_warm_up"))
    text = f"""{records:,} records of
{_number(found["record_bytes"])} bytes, 4 partitions, compression {compression}, acks=all,
idempotent. The tool sends the same images, from the broker's host because Java is there, on as
many cores as the producer's host has ({cores["producer"]}); {warm_up:,} records warm it up and
are not counted. The ratio is that to the tool's own batches, up to 16 kB. The app, whose batches
are of up to 256 kB, makes each message itself."""
    return f"## Producer\n\n{_prose(text)}\n\n{_rows(['', 'records/s'], rows)}"


def _tls(found: Found) -> str:
    sides = found.get("tls")
    if not sides:
        return ""
    names = {"plaintext": "plaintext, nobody is asked", "tls": "TLS 1.3, SCRAM-SHA-512, ACLs"}
    columns = ("records_per_second", "producer_cpu_us", "broker_cpu_us", "login_ms")
    rows = [
        [name, *(_spread(sides[side][column]) for column in columns)]
        for side, name in names.items()
    ]
    header = ["", "records/s", "producer µs a record", "broker µs a record", "ms to log in"]
    text = f"""{found["settings"]["bench"]["producer_records"]:,} records a run, on this machine
without hosts ([tests/bench/tls_cost.py](../tests/bench/tls_cost.py)): the lab's broker has no port
without TLS. Two brokers that differ in nothing else take records in turn from `iot-pipeline produce
--interval 0`, which has one core for itself. Microseconds are of CPU. A login is that of one
connection, from nothing to the first answer that only a known client gets; an app keeps its
connections."""
    return f"""## What TLS and a login cost

{_prose(text)}

{_rows(header, rows)}"""


def _latency(found: Found) -> str:
    latency = found.get("latency_ms")
    if not latency:
        return ""
    rows = [
        [pace, f"{entry['images']:,}", *(_number(entry[name]) for name in ("p50", "p95", "p99"))]
        for pace, entry in latency.items()
    ]
    header = ["images/s", "images", "p50 ms", "p95 ms", "p99 ms"]
    text = """From produced (`ProducedAt`) to stored with its prediction (`StoredAt`), through all
three apps on an otherwise idle lab. The percentiles are those of all repetitions' images
together. The apps are copies of the services, so that no image stays in the lab's database."""
    return f"""## Latency

{_prose(text)}

{_rows(header, rows, right=0)}

![Latency against load](images/latency.svg)"""


def _scaling(found: Found) -> str:
    scaling = found.get("scaling")
    if not scaling:
        return ""
    rows = [
        [
            workers,
            _spread(entry["images_per_second"]),
            _number(entry["cpu_ms_per_image"]["apps"]["median"]),
            _number(entry["cpu_ms_per_image"]["broker"]["median"]),
            _number(entry["cores_used_by_apps"]["median"]),
            _number(entry["cores_used_by_broker"]["median"]),
            _percent(entry["machine_busy"]["median"]),
        ]
        for workers, entry in scaling.items()
    ]
    header = ["partitions and workers", "images/s", "CPU ms an image: apps", "broker"]
    header += ["cores: apps", "broker", "machine busy"]
    return f"""## Scaling

As many inference workers as partitions, all on the one inference host, with the default engine and
the service's threads each.

{_rows(header, rows)}

{_limit(found)}"""


def _limit(found: Found) -> str:
    """What limits scaling, as far as the figures say."""
    scaling: Mapping[str, Found] = found["scaling"]
    cores = found["machine"]["cores"]
    least, most = min(scaling, key=int), max(scaling, key=int)
    gain = (
        scaling[most]["images_per_second"]["median"] / scaling[least]["images_per_second"]["median"]
    )
    busy = scaling[most]["machine_busy"]["median"]
    text = f"{most} workers are {gain:.2f} times as fast as {least}."
    if busy >= 0.9:
        return _prose(
            f"{text} The limit is the machine: its {cores} cores are {busy:.0%} busy, and more "
            "workers only divide them. On hosts with cores of their own they add up."
        )
    return _prose(
        f"{text} The machine's {cores} cores are {busy:.0%} busy then: they are not the limit."
    )


def _memory(found: Found) -> str:
    memory = found.get("memory_mb")
    if not memory:
        return ""
    rows = [
        [role, *(_number(memory[role][name]) for name in MEMORY)]
        for role in ("producer", "inference", "storage")
        if role in memory
    ]
    header = ["MB resident", *MEMORY]
    text = f"""All three apps while {memory["images"]:,} images flow through them, after
{memory["warm_up"]:,} others that fill caches and buffers. Fresh is right after the app's start,
start is after these others."""
    return f"""## Memory

{_prose(text)}

{_rows(header, rows)}"""


def _machine(found: Found) -> str:
    machine = found["machine"]
    rows = [
        ["processor", machine["processor"]],
        ["cores", str(machine["cores"])],
        ["instructions", ", ".join(machine["instructions"])],
        ["memory", f"{machine['memory_gb']:g} GB"],
        ["kernel", machine["kernel"]],
    ]
    for role, versions in found["versions"].items():
        listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        rows.append([f"{role} host", listed.replace("|", "\\|")])
    settings = [
        [role, ", ".join(f"`{name}={value}`" for name, value in sorted(values.items()) if value)]
        for role, values in found["settings"].items()
        if role != "bench"
    ]
    return (
        "## Machine, versions and settings\n\n"
        + _rows(["", ""], rows, right=2)
        + "\n\n"
        + _rows(["app", "settings"], settings, right=2)
    )


def _commands(found: Found) -> str:
    failures = found.get("failures", {})
    text = """## Again

On a running lab (`make lab`), with nothing else at work on the machine:

```
make bench                                                    # all of it, half an hour
make bench ARGS="--only inference,storage --images 5000 --repetitions 1"
make bench ARGS=--render                                      # this page from its JSON
```

The lab's services are stopped meanwhile. What is measured are copies of their units, with the same
user, sandbox, environment and release, and with topics, groups and databases of their own, which
are removed at the end."""
    if failures:
        listed = "\n".join(f"- {title}" for title in failures)
        text += f"\n\nNot measured, because it failed:\n\n{listed}"
    return text


def _plot_engines(found: Found, file: Path) -> None:
    def draw(axes: Any) -> None:
        for engine, entry in found["ceiling"].items():
            by_batch: Mapping[str, Found] = entry["images_per_second"]
            batches = [int(batch) for batch in by_batch]
            axes.plot(batches, [each["median"] for each in by_batch.values()], "o-", label=engine)
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, labels=list(by_batch))
        axes.set_xlabel("batch size")
        axes.set_ylabel("images/s")
        axes.set_ylim(bottom=0)
        axes.legend()

    _plot(file, draw)


def _plot_latency(found: Found, file: Path) -> None:
    def draw(axes: Any) -> None:
        latency: Mapping[str, Found] = found["latency_ms"]
        paces = [int(pace) for pace in latency]
        for name in ("p99", "p95", "p50"):
            axes.plot(paces, [entry[name] for entry in latency.values()], "o-", label=name)
        axes.set_xscale("log")
        axes.set_xticks(paces, labels=list(latency))
        axes.minorticks_off()
        axes.set_xlabel("images/s")
        axes.set_ylabel("ms from produced to stored")
        axes.set_ylim(bottom=0)
        axes.legend()

    _plot(file, draw)


def _plot(file: Path, draw: Callable[[Any], None]) -> None:
    """Draw into an SVG file that is the same for the same figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text as text is small, and ids that do not change keep a new version's difference small.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "iot-pipeline"}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=True, alpha=0.3)
        draw(axes)
        figure.savefig(file, format="svg", metadata={"Date": None})
