# shellcheck shell=bash
# Isambard-AI: nodes of 4 GH200 (96 GB each, 72 cores a GPU) on Slingshot 11. Sourced by `slurm.sh --env isambard`.
# https://docs.isambard.ac.uk/user-documentation/guides/nccl

# NCCL and its plugin for Slingshot (aws-ofi-nccl on libfabric), with the settings that the site recommends.
if ! command -v module >/dev/null; then
    echo "isambard.sh: error: expected the command module, as on the nodes of Isambard-AI; found none" >&2
    exit 2
fi
module load brics/nccl

export NCCL_NET="AWS Libfabric" # a missing plugin then fails, instead of falling back to slow sockets
export NCCL_SOCKET_IFNAME=hsn   # where NCCL's ranks first meet: the Slingshot interfaces
export GLOO_SOCKET_IFNAME=hsn0  # gloo wants one interface by its whole name
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-16}

# Each rank on the cores and memory beside its GPU; torchrun does that with numactl.
if command -v numactl >/dev/null; then export NUMA_BINDING=node; fi
