#!/bin/sh
# Usage: kafka-server-start.sh [-daemon] SERVER.PROPERTIES [--override PROPERTY=VALUE]...
# Starts a broker, a controller or both, as process.roles in the properties says.
set -eu

bin=$(dirname -- "$(readlink -f -- "$0")")
daemon=
if [ "${1:-}" = -daemon ]; then daemon=-daemon; shift; fi
if [ $# -eq 0 ]; then
  echo "Usage: ${0##*/} [-daemon] SERVER.PROPERTIES [--override PROPERTY=VALUE]..." >&2
  exit 1
fi

export KAFKA_HEAP_OPTS="${KAFKA_HEAP_OPTS:--Xmx1G -Xms1G}"
export KAFKA_LOG4J_OPTS="${KAFKA_LOG4J_OPTS:--Dlog4j2.configurationFile=$bin/../config/log4j2.yaml}"
export LOG_DIR="${LOG_DIR:-$bin/../logs}"
mkdir -p "$LOG_DIR"
# shellcheck disable=SC2086
exec "$bin/kafka-run-class.sh" $daemon -name kafkaServer -loggc kafka.Kafka "$@"
