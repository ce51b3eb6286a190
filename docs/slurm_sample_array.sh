#!/bin/bash
# Samples in one folder with up to 16 jobs of one GPU, which need not run at the same time. sbatch docs/slurm_sample_array.sh
#SBATCH --job-name=sample
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes (more than the SampleWriter's stop_within) before the node is taken away: the process finishes its shard or gives
# it back, and this job of the array is queued again.
#SBATCH --signal=SIGUSR1@120

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export OMP_NUM_THREADS=1
# No process group: each job claims free shards, and those of jobs that died. The last one measures the complete folder.
srun .venv/bin/calib-guidance predict \
  --config imagenet128/resnet101_js --trainer.devices 1
