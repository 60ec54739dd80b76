#!/usr/bin/env bash
# Starts one verb on this node's processes, together with the other nodes of the job: torchrun -m megatron_prune VERB.
#
#     tools/launch.sh [options] VERB [flags of the verb]
#
#     --nnodes N          nodes of the job                          (SLURM_NNODES, NNODES, 1)
#     --node-rank R       number of this node, from 0               (SLURM_NODEID, JOB_COMPLETION_INDEX, NODE_RANK, 0)
#     --master-addr HOST  node 0, as the others reach it            (first of SLURM_JOB_NODELIST, MASTER_ADDR)
#     --master-port P     free port on it                           (MASTER_PORT, 29500)
#     --nproc-per-node N  processes here                            (SLURM_GPUS_ON_NODE, NPROC_PER_NODE, number of visible GPUs, 1)
#     --local-addr HOST   this node, as the others reach it         (LOCAL_ADDR, the name of the machine)
#     --interface NAME    network interface of gloo and NCCL        (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, their choice)
#     --max-restarts K    starts after a failure                    (3 when the verb has --restartable, else 0)
#     --dry-run           print the command, run nothing
#
# PYTHON names the interpreter; left out: the repository's .venv, else python3.
#
# A flag beats SLURM, SLURM beats Kubernetes (an indexed Job), and that beats the plain variables. Run it once on every
# node. The nodes may be started in any order, and one that died may be started again: those left wait for it.
set -euo pipefail

fail() { echo "launch: $*" >&2; exit 2; }

# number NAME VALUE LOWEST [HIGHEST]
number() {
    local range="$3 or more"
    [ $# -lt 4 ] || range="$3 to $4"
    [[ $2 =~ ^[0-9]{1,9}$ ]] || fail "$1 ${2:-(nothing)} was given; allowed: a whole number, $range"
    if (( 10#$2 < $3 )) || { [ $# -ge 4 ] && (( 10#$2 > $4 )); }; then
        fail "$1 $2 was given; allowed: $range"
    fi
}

nnodes='' node_rank='' master_addr='' master_port='' nproc='' local_addr='' interface='' max_restarts='' dry_run=''
while [[ ${1:-} == --* ]]; do
    name=${1%%=*}
    case $name in
        --dry-run) dry_run=1; shift; continue ;;
        --nnodes | --node-rank | --master-addr | --master-port | --nproc-per-node) ;;
        --local-addr | --interface | --max-restarts) ;;
        *) fail "unknown option $name; flags of the verb come after the verb; $0 explains the options in its first lines" ;;
    esac
    if [[ $1 == *=* ]]; then value=${1#*=}; shift; else value=${2:-}; shift $(( $# > 1 ? 2 : 1 )); fi
    [[ -n $value && $value != --* ]] || fail "$name needs a value; ${value:-nothing} was given"
    case $name in
        --nnodes) nnodes=$value ;;
        --node-rank) node_rank=$value ;;
        --master-addr) master_addr=$value ;;
        --master-port) master_port=$value ;;
        --nproc-per-node) nproc=$value ;;
        --local-addr) local_addr=$value ;;
        --interface) interface=$value ;;
        --max-restarts) max_restarts=$value ;;
    esac
done
[ $# -gt 0 ] || fail "no verb was given; allowed: launch.sh [options] VERB [flags of the verb]"

if [ -n "${SLURM_JOB_ID:-}" ]; then
    [ "${SLURM_LOCALID:-0}" = 0 ] ||
        fail "SLURM started several tasks on this node; start one, which starts the others: srun --ntasks-per-node=1"
    nnodes=${nnodes:-${SLURM_NNODES:-}}
    node_rank=${node_rank:-${SLURM_NODEID:-}}
    nproc=${nproc:-${SLURM_GPUS_ON_NODE:-}}
    if [ -z "$master_addr" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] && command -v scontrol > /dev/null; then
        master_addr=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
fi
nnodes=${nnodes:-${NNODES:-1}}
node_rank=${node_rank:-${JOB_COMPLETION_INDEX:-${NODE_RANK:-0}}}
master_addr=${master_addr:-${MASTER_ADDR:-}}
master_port=${master_port:-${MASTER_PORT:-29500}}
local_addr=${local_addr:-${LOCAL_ADDR:-}}
nproc=${nproc:-${NPROC_PER_NODE:-}}
if [ -z "$nproc" ]; then
    nproc=1
    if [ "${MEGATRON_PRUNE_DEVICE:-}" = cpu ]; then
        :
    elif [ -n "${CUDA_VISIBLE_DEVICES+given}" ]; then
        IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
        nproc=$(( ${#visible[@]} > 0 ? ${#visible[@]} : 1 ))
    elif command -v nvidia-smi > /dev/null && gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU'); then nproc=$gpus; fi
fi

number --nnodes "$nnodes" 1
number --node-rank "$node_rank" 0 $(( nnodes - 1 ))
number --master-port "$master_port" 1 65535
number --nproc-per-node "$nproc" 1
if [ "$nnodes" -gt 1 ] && [ -z "$master_addr" ]; then
    fail "$nnodes nodes and no --master-addr; give the name or address of node 0 as the others reach it"
fi
if [ -z "$max_restarts" ]; then
    max_restarts=0
    for word in "$@"; do [ "$word" != --restartable ] || max_restarts=3; done
fi
number --max-restarts "$max_restarts" 0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

settings=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
# Shared with the launcher, the processes' store is announced in the first round only: a node that is started again
# would wait for it for ever.
[ "$nnodes" = 1 ] || settings+=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
[ -z "$interface" ] || settings+=(GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface")
command=("$python" -m torch.distributed.run --nproc-per-node "$nproc" --max-restarts "$max_restarts")
if [ "$nnodes" = 1 ]; then
    command+=(--standalone)
else
    # Node 0 keeps the rendezvous' store; said outright, because a node cannot always tell that an address is its own.
    is_host=$(( node_rank == 0 ))
    command+=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$master_addr:$master_port")
    command+=(--rdzv-id "${SLURM_JOB_ID:-megatron_prune}" --rdzv-conf "is_host=$is_host,join_timeout=1800,read_timeout=600")
    [ -z "$local_addr" ] || command+=(--local-addr "$local_addr")
fi
command+=(-m megatron_prune "$@")

if [ -n "$dry_run" ]; then
    line=$(printf '%q ' env "${settings[@]}" "${command[@]}")
    echo "${line% }"
    exit 0
fi
exec env "${settings[@]}" "${command[@]}"
