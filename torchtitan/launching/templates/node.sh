node() { # node INDEX HEAD PORT: run by each host
    local index=$1 head=$2 port=$3 host=()
    set -e
    trap '' USR1 # only the ranks handle it
    {{environment}}
    {{setup}}
    config=$(mktemp -d)/{{file}}
    cat >"$config" <<'{{delimiter}}'
{{toml}}
{{delimiter}}
    [ "$index" != 0 ] || host=(--local-addr "$head")
    exec {{python}} -m torchtitan.runtime.torchrun{{options}} \
        --nnodes {{nodes}} --nproc-per-node {{processes}} --max-restarts {{max_restarts}} \
        --rdzv-backend c10d --rdzv-id {{name}} --rdzv-endpoint "$head:$port" \
        --rdzv-conf "is_host=$((index == 0)),{{rdzv_conf}}" "${host[@]}" \
        -m torchtitan.train --job.config_file "$config"{{arguments}} </dev/null
}
