"""Sends images as the host's own service does, beside it, and watches how they are confirmed.

Runs on a producer's host as root. Reads `count`, `interval` (seconds) and `source_name` as JSON
from standard input and prints as JSON how the producer ended, and the longest time in seconds in
which no image was confirmed.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

PORT = 19190
STEP = 0.05  # seconds


def confirmed() -> float:
    """Images that Kafka has confirmed so far; 0 before the producer answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=2) as answer:
            text = answer.read().decode()
    except OSError:
        return 0
    return sum(map(float, re.findall(r"(?m)^iot_records_out_total\{.*\} (\S+)$", text)))


def main() -> None:
    asked = json.load(sys.stdin)
    with tempfile.TemporaryFile("w+") as log:
        producer = subprocess.Popen(
            [
                *("runuser", "--user=iot-pipeline", "--", "iot-pipeline", "produce"),
                *("--count", str(asked["count"]), "--interval", str(asked["interval"])),
                *("--source-name", asked["source_name"], "--metrics-port", str(PORT)),
            ],
            stderr=log,
        )
        seen, since, longest = 0.0, time.monotonic(), 0.0
        while producer.poll() is None:
            time.sleep(STEP)
            count = confirmed()
            if count > seen:
                # The start is no pause.
                longest = max(longest, time.monotonic() - since) if seen else longest
                seen, since = count, time.monotonic()
        log.seek(0)
        said = log.read()[-2000:]
    found = {"status": producer.returncode, "longest_pause": longest, "said": said}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
