"""Prints the newest documents of a backup on this host.

stdin   {"file": "/var/tmp/…/backup", "newest": 30}
stdout  [{"_id": "…", …}]
"""

import heapq
import io
import json
import sys

import zstandard


def main(file: str, newest: int) -> None:
    with zstandard.open(file, "rb") as stream:
        lines = io.TextIOWrapper(stream)
        # All lines but the first and the last are documents.
        documents = (line for line in map(json.loads, lines) if "_id" in line)
        found = heapq.nlargest(newest, documents, key=lambda document: str(document["_id"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(**json.load(sys.stdin))
