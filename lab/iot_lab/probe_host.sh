# What `lab status` and `lab report` want to know of a host, as lines "name value". Runs on the
# host, as root.
. /etc/os-release
echo "system $NAME $VERSION_ID"
echo "up $(ps -o etimes= -p 1)"

# A container's memory is its cgroup's, without the files that the kernel could drop at once; a
# machine of its own has no limit to look at, and its memory is its own.
old=/sys/fs/cgroup/memory
new=/sys/fs/cgroup
if [ -e "$old/memory.usage_in_bytes" ]; then
    used=$(cat "$old/memory.usage_in_bytes")
    cached=$(awk '$1 == "total_inactive_file" { print $2 }' "$old/memory.stat")
elif [ -e "$new/memory.current" ]; then
    used=$(cat "$new/memory.current")
    cached=$(awk '$1 == "inactive_file" { print $2 }' "$new/memory.stat")
else
    used=$(awk '$1 == "MemTotal:" { all = $2 } $1 == "MemAvailable:" { free = $2 }
        END { printf "%d", (all - free) * 1024 }' /proc/meminfo)
    cached=0
fi
echo "memory $((used - cached))"
echo "now $(date +%s)"

# One block of properties a unit, an empty line between two.
echo units
systemctl show --timestamp=unix \
    --property=Id,LoadState,ActiveState,SubState,ActiveEnterTimestamp,NRestarts \
    kafka.service couchdb.service mongod.service \
    iot-producer.service iot-inference.service iot-storage.service
