#!/bin/bash
# {{title}}
# {{command}}
# Ctrl-C stops it: the ranks save a checkpoint and leave.

set -uo pipefail
hosts=({{hosts}})
ssh=({{ssh}})
pid_file=/tmp/torchtitan-{{name}}.pid

{{node}}

run() { # run INDEX HOST
    {
        {{secrets}}
        declare -f node
        echo "echo \$\$ >$pid_file; node $1 {{head}} {{port}}"
    } | "${ssh[@]}" "$2" bash -s 2>&1 | sed -u "s/^/[$2] /"
    return "${PIPESTATUS[1]}"
}

stop() {
    for host in "${hosts[@]}"; do
        echo "kill -TERM \$(cat $pid_file)" | "${ssh[@]}" "$host" bash -s 2>/dev/null
    done
}

trap stop INT TERM
running=()
for index in "${!hosts[@]}"; do
    # Ctrl-C is for this script, which tells the hosts.
    (trap '' INT; run "$index" "${hosts[$index]}") &
    running+=($!)
done

code=0
while [ "${#running[@]}" -gt 0 ]; do
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
            continue
        fi
        wait "$pid"
        ended=$?
        if [ "$ended" != 0 ] && [ "$code" = 0 ]; then
            code=$ended
            stop # the other hosts would wait for this one
        fi
    done
    running=("${left[@]}")
    sleep 0.5
done
exit "$code"
