#!/bin/bash
# {{title}}
# {{command}}
# Ctrl-C or closing the terminal stops the job: the ranks save a checkpoint and exit.

set -uo pipefail
{{required}}
hosts=({{hosts}})
ssh=({{ssh}})
pid_file=.torchtitan-{{name}}-$$-$RANDOM.pid # in the home folder, where ssh starts

{{node}}

run() { # run INDEX HOST
    {
        {{secrets}}
        declare -f node
        echo "(echo \$BASHPID >$pid_file.$1 || exit; node $1 {{head}} {{port}})"
        echo "code=\$?; rm -f $pid_file.$1; exit \$code"
    } | "${ssh[@]}" "$2" bash -s 2>&1 | { # if a closed terminal ends sed, the job continues
        sed -u "s/^/[$2] /" || cat >/dev/null
    }
    return "${PIPESTATUS[1]}"
}

stop() { # on the hosts where it still runs
    for index in "${!running[@]}"; do
        kill -0 "${running[$index]}" 2>/dev/null || continue
        ( # in parallel, since a dead host is slow to time out
            trap '' INT HUP
            echo "kill -TERM \$(cat $pid_file.$index)" | "${ssh[@]}" "${hosts[$index]}" bash -s
        ) &
    done
}

running=()
trap stop INT TERM HUP
for index in "${!hosts[@]}"; do
    # Only this script gets the terminal's signals, and passes them on to the hosts.
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
            stop # or the other hosts would wait for this one
        fi
    done
    sleep 0.5
done
wait
exit "$code"
