#!/bin/bash
# {{title}}
# {{command}}
# Ctrl-C stops it, and so does closing the terminal: the ranks save a checkpoint and leave.

set -uo pipefail
{{required}}
hosts=({{hosts}})
ssh=({{ssh}})
pid_file=.torchtitan-{{name}}-$$-$RANDOM.pid # in the home folder, where ssh begins

{{node}}

run() { # run INDEX HOST
    {
        {{secrets}}
        declare -f node
        echo "(echo \$BASHPID >$pid_file.$1 || exit; node $1 {{head}} {{port}})"
        echo "code=\$?; rm -f $pid_file.$1; exit \$code"
    } | "${ssh[@]}" "$2" bash -s 2>&1 | { # where a closed terminal ends sed, the job goes on
        sed -u "s/^/[$2] /" || cat >/dev/null
    }
    return "${PIPESTATUS[1]}"
}

stop() { # on the hosts where it runs still
    for index in "${!running[@]}"; do
        kill -0 "${running[$index]}" 2>/dev/null || continue
        ( # beside the others, as a host that is gone takes its time
            trap '' INT HUP
            echo "kill -TERM \$(cat $pid_file.$index)" | "${ssh[@]}" "${hosts[$index]}" bash -s
        ) &
    done
}

running=()
trap stop INT TERM HUP
for index in "${!hosts[@]}"; do
    # Signals of the terminal are for this script, which tells the hosts.
    (trap '' INT HUP; run "$index" "${hosts[$index]}") &
    running[index]=$!
done

code=0
while [ "${#running[@]}" -gt 0 ]; do
    for index in "${!running[@]}"; do
        ! kill -0 "${running[$index]}" 2>/dev/null || continue
        wait "${running[$index]}"
        ended=$?
        unset "running[$index]"
        if [ "$ended" != 0 ] && [ "$code" = 0 ]; then
            code=$ended
            stop # the other hosts would wait for this one
        fi
    done
    sleep 0.5
done
wait
exit "$code"
