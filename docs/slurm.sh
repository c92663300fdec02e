#!/bin/bash
# The paper's recipe on two nodes of eight GPUs; from the root: sbatch docs/slurm.sh
# Weights are sharded within a node and copied across nodes. Fifteen minutes before the time limit (enough for a step and
# a checkpoint of 100 GB), and when preempted, every process gets SIGTERM, saves and exits 0; submit again to go on.
#SBATCH --job-name=mmhops
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# One process per GPU, started by srun itself: torchrun would kill them 30 seconds after the signal, too soon to save 7B.
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec .venv/bin/python train.py paper \
    --kb data/MMhops-KB --data data/MMhops --out runs/paper --resume "$@"' train "$@"
