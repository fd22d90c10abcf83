#!/bin/sh
# Usage: kafka-run-class.sh [-daemon] [-name NAME] [-loggc] CLASS [ARGUMENTS]
# Runs one of Kafka's classes. Set by the environment: JAVA_HOME, KAFKA_HEAP_OPTS,
# KAFKA_JVM_PERFORMANCE_OPTS, KAFKA_LOG4J_OPTS, KAFKA_JMX_OPTS, KAFKA_GC_LOG_OPTS, KAFKA_OPTS,
# CLASSPATH and LOG_DIR.
set -eu

home=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
log_dir=${LOG_DIR:-$home/logs}
name=kafka
daemon=
gc_log=

while [ $# -gt 0 ]; do
  case $1 in
    -daemon) daemon=1; shift ;;
    -loggc) gc_log=1; shift ;;
    -name) name=$2; shift 2 ;;
    *) break ;;
  esac
done
if [ $# -eq 0 ]; then
  echo "Usage: ${0##*/} [-daemon] [-name NAME] [-loggc] CLASS [ARGUMENTS]" >&2
  exit 1
fi

java=java
if [ -n "${JAVA_HOME:-}" ]; then java=$JAVA_HOME/bin/java; fi
if ! command -v "$java" >/dev/null 2>&1; then
  echo "${0##*/}: no Java at '$java'. Install Java 17 or newer, or set JAVA_HOME." >&2
  exit 1
fi

if [ -n "$gc_log" ] && [ -z "${KAFKA_GC_LOG_OPTS:-}" ]; then
  KAFKA_GC_LOG_OPTS="-Xlog:gc*:file=$log_dir/$name-gc.log:time,tags:filecount=10,filesize=100M"
fi
if [ -z "${KAFKA_JVM_PERFORMANCE_OPTS:-}" ]; then
  case $1 in
    kafka.Kafka | *Performance)
      KAFKA_JVM_PERFORMANCE_OPTS="-server -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -XX:+ExplicitGCInvokesConcurrent"
      ;;
    *)
      # A tool is done before the optimizing compiler and several threads of garbage collection pay.
      KAFKA_JVM_PERFORMANCE_OPTS="-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
      ;;
  esac
fi
# Tools write only warnings, and to the terminal: they must run for users who cannot write logs.
if [ -z "${KAFKA_LOG4J_OPTS:-}" ]; then
  KAFKA_LOG4J_OPTS="-Dlog4j2.configurationFile=$home/config/tools-log4j2.yaml"
fi

# Each of these holds several options, so they must be split into words.
# shellcheck disable=SC2086
set -- "$java" ${KAFKA_HEAP_OPTS:--Xmx256M} $KAFKA_JVM_PERFORMANCE_OPTS ${KAFKA_GC_LOG_OPTS:-} \
  -Djava.awt.headless=true ${KAFKA_JMX_OPTS:-} "-Dkafka.logs.dir=$log_dir" $KAFKA_LOG4J_OPTS \
  -cp "${CLASSPATH:+$CLASSPATH:}$home/libs/*" ${KAFKA_OPTS:-} "$@"

if [ -n "$daemon" ]; then
  mkdir -p "$log_dir"
  nohup "$@" >"$log_dir/$name.out" 2>&1 </dev/null &
else
  exec "$@"
fi
