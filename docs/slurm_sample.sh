#!/bin/bash
# Samples on 2 nodes of 8 GPUs; survives pre-emption and time limits. sbatch docs/slurm_sample.sh
#SBATCH --job-name=sample
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes (more than the SampleWriter's stop_within) before the nodes are taken away: every process finishes its shard or
# gives it back, and the job is queued again.
#SBATCH --signal=SIGUSR1@120

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export OMP_NUM_THREADS=1
# The same command every time: it begins, or does what is left.
srun .venv/bin/calib-guidance predict \
  --config imagenet128/resnet101_js \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 8 --trainer.strategy ddp
