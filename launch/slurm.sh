#!/usr/bin/env bash
# One training run on several nodes under Slurm; change the numbers below, or give them to sbatch:
#     sbatch --nodes=4 launch/slurm.sh +recipe=qa_128k output_dir=/shared/runs/qa_128k checkpoint.every=50
# Slurm starts the ranks itself, so that its signals reach them: five minutes before the time is up they write a
# checkpoint and end with exit code 75, and the job is queued again; it resumes from there. output_dir has to be on a
# file system that all nodes share.
#SBATCH --job-name=lrsa
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
cd "${SLURM_SUBMIT_DIR:-.}"
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
PYTHON=${PYTHON:-$PWD/.venv/bin/python}

# The arguments of the inner shell are those of this script; what each rank is, Slurm tells it.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*}
    exec "$0" launch/train.py "$@"
' "$PYTHON" "$@"
code=$?
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
