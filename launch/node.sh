#!/usr/bin/env bash
# Run a command on one node, on as many processes as it has GPUs; or run one node's part of a command on several nodes.
#
#   launch/node.sh train.py --lora-rank 16 --output runs/mine
#   launch/node.sh --ranks 2 -m unlearn fit-lens ...
#   launch/node.sh --nodes 2 --endpoint HEAD:29500 --id RUN --host 1 --address HEAD train.py ...     on the first node
#   launch/node.sh --nodes 2 --endpoint HEAD:29500 --id RUN --host 0 --address OWN train.py ...      on the second
#
#   --dry-run      print what would run
#   --ranks N      processes on this node; default: one a GPU, 1 where there is none
#   --nodes N      nodes that take part (default 1). Above 1 each of them needs
#     --endpoint HOST:PORT   where they meet, the same on all
#     --id ID                the name of this attempt, the same on all and new for each attempt
#     --host 0|1             whether this node is HOST
#     --address ADDRESS      under which the others reach this node
#
# The rest is what would follow `python`. PYTHON chooses another interpreter than .venv's. USR1 and TERM, sent to this
# process, reach every rank on this node, which then have SHUTDOWN_SECONDS (240) to save.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=arguments.sh
source "$root/launch/arguments.sh"

count_gpus() {
    local devices=${CUDA_VISIBLE_DEVICES-unset} count=0
    case $devices in
        unset) if command -v nvidia-smi >/dev/null; then count=$(nvidia-smi -L | grep -c '^GPU' || true); fi ;;
        '' | -1 | NoDevFiles) ;;
        *) count=$(($(tr -cd , <<<"$devices" | wc -c) + 1)) ;;
    esac
    echo $((count > 0 ? count : 1))
}

# Whether the installed torchrun has an option; torch itself, which takes seconds to import, is not.
torchrun_knows() {
    "$python" -c 'import importlib.util as find, pathlib, sys
torch = find.find_spec("torch")
run = pathlib.Path(torch.origin).parent / "distributed/run.py" if torch else None
sys.exit(run is None or sys.argv[1] not in run.read_text())' "$1"
}

dry_run=false ranks='' nodes=1 endpoint='' id='' host='' address=''
while (($#)); do
    case $1 in
        --dry-run) dry_run=true && shift && continue ;;
        --ranks) ranks=$(value_of "$@") ;;
        --nodes) nodes=$(value_of "$@") ;;
        --endpoint) endpoint=$(value_of "$@") ;;
        --id) id=$(value_of "$@") ;;
        --host) host=$(value_of "$@") ;;
        --address) address=$(value_of "$@") ;;
        -m | [!-]*) break ;;
        *) fail "expected --dry-run, --ranks, --nodes, --endpoint, --id, --host or --address before the command; found $1" ;;
    esac
    shift 2
done
(($#)) || fail "expected a command, e.g. train.py --lora-rank 16; found none"
ranks=${ranks:-$(count_gpus)}
[[ $ranks =~ ^[1-9][0-9]*$ && $nodes =~ ^[1-9][0-9]*$ ]] ||
    fail "expected whole numbers above 0 for --ranks and --nodes; found $ranks and $nodes"
if ((nodes > 1)); then
    [[ $endpoint == *:* && -n $id && $host =~ ^[01]$ && -n $address ]] ||
        fail "expected --endpoint HOST:PORT, --id, --host 0|1 and --address with --nodes $nodes; found one missing"
elif [[ -n $endpoint$id$host$address ]]; then
    fail "--endpoint, --id, --host and --address have no effect on one node: leave them out, or give --nodes"
fi

python=$(interpreter)
cores=$(nproc)
threads=$((cores / ranks))
declare -A settings=(
    [OMP_NUM_THREADS]=$((threads > 16 ? 16 : threads > 0 ? threads : 1))
    [TOKENIZERS_PARALLELISM]=false
)
if ((nodes == 1)); then # one node needs nobody else: let nothing of the ranks listen beyond it
    settings+=([GLOO_SOCKET_IFNAME]=lo [NCCL_SOCKET_IFNAME]=lo [TORCH_DISABLE_SHARE_RDZV_TCP_STORE]=1)
fi
for name in "${!settings[@]}"; do export "$name=${!name:-${settings[$name]}}"; done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

command=("$python")
if ((ranks * nodes > 1)); then
    # A rank that fails ends the attempt: retries are Slurm's or the user's, from a checkpoint (--max-restarts 0).
    # torchrun leaves its workers behind on a signal that it does not handle, so USR1 is added to its list.
    command+=(-m torch.distributed.run --nproc-per-node "$ranks" --max-restarts 0
        --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    # Before torch 2.12 it has no such option, and gives its workers 30 seconds.
    if torchrun_knows --shutdown-timeout; then command+=(--shutdown-timeout "${SHUTDOWN_SECONDS:-240}"); fi
    if [[ -n ${NUMA_BINDING-} ]]; then command+=(--numa-binding "$NUMA_BINDING"); fi
    if ((nodes > 1)); then
        command+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id"
            --rdzv-conf "is_host=$host" --local-addr "$address")
    else # torchrun's stores listen on every interface, unless it is given a file and the ranks make a store themselves
        meeting=DRY_RUN
        $dry_run || meeting=$(mktemp -t unlearn-ranks.XXXXXX)
        command+=(--rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint "$meeting" --local-addr 127.0.0.1)
    fi
fi
if [[ $1 != -m && -f $root/$1 ]]; then # the scripts of this project, from wherever this was started
    command+=("$root/$1")
    shift
fi
command+=("$@")

if $dry_run; then
    for name in $(printf '%s\n' "${!settings[@]}" | sort) PYTHONPATH; do show "export" "$name=${!name}"; done
    show "${command[@]}"
    exit
fi
exec "${command[@]}"
