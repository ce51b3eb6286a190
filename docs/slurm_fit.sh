#!/bin/bash
# Calibrates a classifier on 2 nodes of 8 GPUs; survives pre-emption and time limits. sbatch docs/slurm_fit.sh
#SBATCH --job-name=calibrate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes (more than a validation takes) before the nodes are taken away: a checkpoint is written and the job queued again.
#SBATCH --signal=SIGUSR1@300

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export OMP_NUM_THREADS=1
# The same command every time: it starts, or resumes from the newest checkpoint.
srun .venv/bin/calib-guidance fit \
  --config imagenet128_resnet50 \
  --config input/denoised_offline \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 8 --trainer.strategy ddp \
  --ckpt_path last
