#!/bin/bash
# Pre-training on several machines under SLURM. Started again, by you or by itself, it goes on where it was:
#
#     sbatch --nodes 4 examples/slurm.sh run.yaml distributed.shard_size=8
#
#SBATCH --job-name=steplm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

set -euo pipefail

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# srun in the background, so that this shell hears the signal that comes 300 seconds before the end.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_machine:29400" \
    --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    -m steplm train "$@" &
steps=$!

requeue() {
    kill -TERM "$steps"     # every rank finishes its step and saves
    wait "$steps" || true
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue TERM

wait "$steps"
