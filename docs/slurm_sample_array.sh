#!/bin/bash
# Samples in one folder with up to 16 jobs of one GPU each, which need not run at the same time. sbatch docs/slurm_sample_array.sh
#SBATCH --job-name=sample
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# This long before the node is taken away the process finishes its shard, or gives it back, and exits with status 4.
#SBATCH --signal=SIGUSR1@120

set -uo pipefail
cd "$SLURM_SUBMIT_DIR"
export OMP_NUM_THREADS=1
# No process group: each job takes the shards that nobody else has, and those of jobs that died.
srun .venv/bin/calib-guidance predict \
  --config lightning_configs/predict/imagenet128/resnet101_js.yaml --trainer.devices 1
status=$?
if [ "$status" -eq 4 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
