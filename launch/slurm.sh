#!/usr/bin/env bash
# Trains one recipe on several nodes of a Slurm cluster: one torchrun a node, one process a GPU.
#
#   sbatch --nodes 8 launch/slurm.sh recipes/mine.toml --workspace /shared/runs/mine
#
# The same command again goes on where the last one stopped. The workspace must lie on a disk that all nodes share.
#SBATCH --job-name=trivium
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: sbatch --nodes N launch/slurm.sh RECIPE [options of trivium run]" >&2
  exit 2
fi

PYTHON="${PYTHON:-python3}"                       # the environment's own, e.g. PYTHON=.venv/bin/python
GPUS="${SLURM_GPUS_ON_NODE:-8}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
PORT=$((20000 + SLURM_JOB_ID % 20000))            # two jobs on one node do not meet
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$GPUS} / GPUS))}"

# --signal sends SIGTERM three minutes before the time is up: the run saves a checkpoint and ends, --requeue starts it anew.
exec srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "$GPUS" \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:$PORT" \
  -m trivium run "$@"
