#!/bin/sh
# Usage: kafka-server-stop.sh
# Asks every Kafka server of this user (root: of this host) to shut down in order.
set -eu

user=$(id -u)
if [ "$user" -eq 0 ]; then
  pids=$(pgrep -f '^[^ ]*java .* kafka\.Kafka ' || true)
else
  pids=$(pgrep -u "$user" -f '^[^ ]*java .* kafka\.Kafka ' || true)
fi
if [ -z "$pids" ]; then
  echo "No kafka server to stop" >&2
  exit 1
fi
# shellcheck disable=SC2086
kill -TERM $pids
