#!/usr/bin/env bash
# A private Slurm on this machine, whose nodes are daemons with a port each: what the tests of slurm.sh and chain.sh use.
#
#   tests/launch/fakeslurm.sh up FOLDER [NODES] [PORT] [TRACKING]     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/launch/fakeslurm.sh down FOLDER
#
# It needs root and `apt-get install --no-install-recommends slurm-wlm munge`. A node has 4 stand-ins for GPUs. TRACKING
# is how signals find a step's processes: linuxproc (all of them) or pgid (those that did not leave the task's group:
# not torchrun's workers, as with cgroups on real clusters).
set -euo pipefail

command=$1 folder=$(realpath -m "$2") nodes=${3:-2} port=${4:-17000} tracking=${5:-linuxproc}
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf

up() {
    mkdir -p "$folder"/{state,spool,log,dev} /run/munge
    chown munge:munge /run/munge
    chmod 755 /run/munge
    munge -n >/dev/null 2>&1 || su -s /bin/sh munge -c /usr/sbin/munged
    for i in 0 1 2 3; do
        [[ -e $folder/dev/gpu$i ]] || mknod "$folder/dev/gpu$i" c 1 3
    done
    local names
    names="nid[001-$(printf %03d "$nodes")]"
    cat >"$folder/slurm.conf" <<C
ClusterName=fake
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort=$port
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SlurmctldTimeout=30
SlurmdTimeout=30
MinJobAge=600
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
NodeName=$names NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] Sockets=4 CoresPerSocket=72 ThreadsPerCore=1 RealMemory=800000 Gres=gpu:4 State=UNKNOWN
PartitionName=workq Nodes=ALL Default=YES MaxTime=1-0 State=UP PriorityTier=10 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=1-0 State=UP PriorityTier=100
C
    echo "NodeName=$names Name=gpu File=$folder/dev/gpu[0-3]" >"$folder/gres.conf"
    slurmctld -c
    for i in $(seq "$nodes"); do slurmd -N "nid$(printf %03d "$i")"; done
    for _ in $(seq 100); do
        [[ $(sinfo --noheader --states=idle --format=%D --partition=workq 2>/dev/null) == "$nodes" ]] && return
        sleep 0.1
    done
    echo "fakeslurm.sh: error: expected $nodes idle nodes; see $folder/log" >&2
    exit 1
}

down() {
    scancel --user="$(id -un)" || true
    sleep 1
    local file
    for file in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid; do
        if [[ -e $file ]]; then kill "$(cat "$file")" || true; fi
    done
}

"$command"
