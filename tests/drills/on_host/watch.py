"""Prints, twice a second, what a service of this host has done: watch.py SERVICE

Each line is JSON: `out` results confirmed, `failures` writes refused or missed, `started` when the
process began (seconds since 1970). Nothing is printed while the service does not answer.
"""

import json
import re
import sys
import time
import urllib.request
from pathlib import Path

INTERVAL = 0.5  # seconds


def total(text: str, name: str) -> float:
    """Sum of a metric over its labels."""
    return sum(map(float, re.findall(rf"(?m)^{name}(?:\{{.*\}})? (\S+)$", text)))


def main(service: str) -> None:
    settings = Path(f"/etc/iot-pipeline/{service}.env").read_text()
    port = re.findall(r"(?m)^IOT_METRICS_PORT=\"?(\d+)", settings)[0]
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
                text = answer.read().decode()
        except OSError:
            pass
        else:
            seen = {
                "out": total(text, "iot_records_out_total"),
                "failures": total(text, "iot_sink_failures_total"),
                "started": total(text, "process_start_time_seconds"),
            }
            print(json.dumps(seen), flush=True)
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main(sys.argv[1])
