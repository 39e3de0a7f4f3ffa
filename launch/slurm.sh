#!/usr/bin/env bash
#SBATCH --job-name=unlearn
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# A Slurm job on one node or several. From the repository's folder:
#
#   sbatch --time=4:00:00 launch/slurm.sh train.py --lora-rank 16 --output runs/mine
#   sbatch --time=4:00:00 --nodes=2 launch/slurm.sh --env isambard train.py --optimizer muon --output runs/mine
#   sbatch --time=4:00:00 --array=1-54%8 launch/slurm.sh --list grid.txt         task i runs line i of grid.txt
#   launch/slurm.sh --dry-run train.py --lora-rank 16 --output runs/mine         here, without Slurm
#
# Account, partition and the like are given to sbatch, or once for all in SBATCH_ACCOUNT, SBATCH_PARTITION, ...
#
#   --env NAME     source launch/env/NAME.sh first: modules and network settings of a cluster
#   --ranks N      processes a node; default: one a GPU
#   --list FILE    commands, one a line, for a job array
#   --requeues N   how often a job that was told to stop goes back into the queue (default 20)
#   --exit-code FILE   write the command's exit code there once it has ended, but not where it goes back into the queue
#   --dry-run      print what would run (SLURM_NNODES=2 to see two nodes)
#
# Five minutes before the time limit Slurm sends USR1. A run that has then saved itself leaves the file PREEMPTED in
# its --output; the job is put back into the queue and goes on from there, on the same nodes or others. So is one that the
# signal met before anything could listen to it. A job that fails is not.
set -euo pipefail

root=$PWD
[[ -f $root/launch/arguments.sh ]] || {
    echo "slurm.sh: error: expected the repository's folder as working folder; found $root: cd there first" >&2
    exit 2
}
# shellcheck source=arguments.sh
source "$root/launch/arguments.sh"

dry_run=false environment='' list='' ranks='' code_file='' requeues=20
while (($#)); do
    case $1 in
        --dry-run) dry_run=true && shift && continue ;;
        --env) environment=$(value_of "$@") ;;
        --ranks) ranks=$(value_of "$@") ;;
        --list) list=$(value_of "$@") ;;
        --requeues) requeues=$(value_of "$@") ;;
        --exit-code) code_file=$(value_of "$@") ;;
        -m | [!-]*) break ;;
        *) fail "expected --dry-run, --env, --ranks, --list, --requeues or --exit-code before the command; found $1" ;;
    esac
    shift 2
done

[[ $requeues =~ ^[0-9]{1,6}$ ]] || fail "expected a whole number for --requeues; found $requeues"

if [[ -n $list ]]; then
    (($# == 0)) || fail "expected either --list or a command; found both"
    index=${SLURM_ARRAY_TASK_ID:-1}
    read_list "$list"
    ((index >= 1 && index <= ${#commands[@]})) ||
        fail "expected --array within 1-${#commands[@]}, the commands of $list; found $index"
    split_words "${commands[index - 1]}"
    set -- "${words[@]}"
fi
(($#)) || fail "expected a command, e.g. train.py --lora-rank 16 --output runs/mine; found none"
output=$(value_of_run --output "$@")
if [[ $1 == train.py ]]; then
    [[ -n $output ]] || fail "expected --output in the flags of train.py: a preempted run is found by it"
fi
case "$1 ${2-} ${3-}" in
    train.py\ * | evals/tamper.py\ * | '-m unlearn fit-lens') # put back into the queue, they go on, --overwrite or not
        [[ -n $(flag_value --resume "$@") ]] || set -- "$@" --resume auto ;;
esac
if [[ -n $environment ]]; then
    [[ -f $root/launch/env/$environment.sh ]] ||
        fail "expected --env to name a file of launch/env; found none for $environment"
    # shellcheck source=/dev/null
    $dry_run || source "$root/launch/env/$environment.sh"
fi

# The name or number under which the other nodes reach node $1.
address() {
    scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}
export -f address

# Compute nodes take everything from the hub's cache: fill it beforehand, once, with `hf download`.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

nodes=${SLURM_NNODES:-1} attempt=${SLURM_RESTART_COUNT:-0} job=${SLURM_JOB_ID:-0}
# One task a node with all of its CPUs; a node that fails ends the others.
step=(srun --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none
    --kill-on-bad-exit=1 --wait=60)
node=("$root/launch/node.sh")
if [[ -n $ranks ]]; then node+=(--ranks "$ranks"); fi
if ((nodes > 1)); then
    head=HEAD
    if ! $dry_run; then
        mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        head=$(address "${names[0]}")
    fi
    # A port and a name of its own for each attempt: what is left of an earlier one cannot be met. Below the kernel's
    # own range (32768...), so that no outgoing connection has taken it.
    port=$((15000 + (job * 16 + attempt) % 17000))
    node+=(--nodes "$nodes" --endpoint "$head:$port" --id "$job.$attempt")
    # shellcheck disable=SC2016  # expanded on each node
    own='exec "$0" --host $((SLURM_NODEID == 0)) --address "$(address "$SLURMD_NODENAME")" "$@"'
    step+=(bash -c "$own")
fi
if $dry_run; then
    if [[ -n $environment ]]; then show source "launch/env/$environment.sh"; fi
    show "${step[@]}" "${node[@]}" "$@"
    exit
fi

# Whether the command ended because it was told to. The marker says so; before it could listen, the exit code: USR1 is
# nothing but Slurm's notice (128 + 10), and TERM (128 + 15) meets the only task of a job on one node from outside alone,
# while on several nodes it also follows a failure on another one.
told_to_stop() {
    [[ -n $output ]] && ((code != 0)) || return 1
    [[ -e $marker ]] || ((code == 138 || (code == 143 && nodes == 1)))
}

echo "job $job, attempt $attempt, on $nodes node(s) (${SLURM_JOB_NODELIST-}): $(show "$@")"
marker=$output/PREEMPTED
if [[ -n $output ]]; then rm -f "$marker"; fi # an earlier attempt's says nothing about this one
code=0
"${step[@]}" "${node[@]}" "$@" || code=$?
if told_to_stop; then
    if ((attempt < requeues)); then
        echo "job $job, attempt $attempt: told to stop, back into the queue"
        scontrol requeue "$job" ||
            fail "expected to put job $job back into the queue; found that Slurm refuses: submit the same command again"
        exit 0
    fi
    echo "slurm.sh: error: expected job $job to end within $requeues requeues; found it told to stop once more: submit" \
        "the same command again to go on, or give --requeues" >&2
    code=1
fi
if [[ -n $code_file ]]; then
    echo "$code" >"$code_file.tmp"
    mv "$code_file.tmp" "$code_file"
fi
exit "$code"
