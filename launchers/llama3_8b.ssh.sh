#!/bin/bash
# llama3 8B on 2 x 8
# Rendered by: torchtitan launch --ssh torchtitan/models/llama3/train_configs/llama3_8b.toml --hosts node1,node2 --secret HF_TOKEN --workdir /shared/runs --dry-run
# Ctrl-C or closing the terminal stops the job: the ranks save a checkpoint and exit.

set -uo pipefail
: "${HF_TOKEN:?must be in the environment}"
hosts=(node1 node2)
ssh=(ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=4)
pid_file=.torchtitan-llama3-8b-$$-$RANDOM.pid # in the home folder, where ssh starts

node() { # node INDEX HEAD PORT: run by each host
    local index=$1 head=$2 port=$3 host=()
    set -e
    trap '' USR1 # only the ranks handle it
    export NCCL_DEBUG=WARN
    export PYTHONUNBUFFERED=1
    cd /shared/runs || exit
    config=$(mktemp -d)/llama3-8b.toml
    cat >"$config" <<'END_OF_JOB'
# Peak learning rates of 8B, 70B and 405B: table 3 of the Llama 3 paper, arXiv:2407.21783.

[job]
dump_folder = "./outputs/llama3_8b"
description = "Llama 3.1 8B on C4, 8 to 128 GPUs of 80 GB"

[model]
name = "llama3"
flavor = "8B"
# torchtitan download meta-llama/Llama-3.1-8B --include tokenizer --include config
tokenizer_path = "./assets/Llama-3.1-8B"

[optimizer]
name = "AdamW"
lr = 3e-4

[lr_scheduler]
warmup_steps = 2000
decay_type = "cosine"
min_lr_factor = 0.1

[training]
dataset = "c4"
local_batch_size = 1
global_batch_size = 512
seq_len = 8192
steps = 40000

[data]
add_bos = true # as the tokenizer begins texts

[loss]
name = "chunked_cross_entropy"
chunk_size = 2048

[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 1

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[compile]
enable = true

[checkpoint]
enable = true
interval = 500
async_mode = "async"
keep_latest_k = 3
END_OF_JOB
    [ "$index" != 0 ] || host=(--local-addr "$head")
    exec python -m torchtitan.runtime.torchrun \
        --nnodes 2 --nproc-per-node 8 --max-restarts 3 \
        --rdzv-backend c10d --rdzv-id llama3-8b --rdzv-endpoint "$head:$port" \
        --rdzv-conf "is_host=$((index == 0)),join_timeout=900" "${host[@]}" \
        -m torchtitan.train --job.config_file "$config" </dev/null
}

run() { # run INDEX HOST
    {
        printf 'export HF_TOKEN=%q\n' "$HF_TOKEN"
        declare -f node
        echo "(echo \$BASHPID >$pid_file.$1 || exit; node $1 node1 29500)"
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
