#!/bin/bash
# LoRA on one GPU of a SLURM cluster: sbatch launch/slurm.sh MODEL_FOLDER TRAIN_FILE [KEY=VALUE ...]
# On several: sbatch --nodes 2 --ntasks-per-node 8 --gres gpu:8 launch/slurm.sh MODEL_FOLDER TRAIN_FILE plan=fsdp out=FOLDER_OF_ALL_NODES
# Five minutes before the time limit SLURM signals the step. minitune saves its state and ends with 128 + SIGUSR1 = 138,
# the job goes back to the queue, and the same command continues, bit for bit.
#SBATCH --job-name=minitune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

model=${1:?the folder of a model} train=${2:?the training data}
srun python -m minitune sft "model.path=$model" "data.train.path=$train" "${@:3}"
code=$?
if [ "$code" -eq 138 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
