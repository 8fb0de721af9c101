#!/bin/bash
# LoRA as a job of Hugging Face: bash launch/huggingface_job.sh GIT_URL MODEL DATASET TO
# GIT_URL: a repository of minitune that pip can reach; MODEL, DATASET, TO: OWNER/NAME on the hub. The adapter is uploaded to TO.
# A job keeps no disk when it ends, so give --timeout more time than the run needs.
set -eu
url=${1:?a git URL} model=${2:?OWNER/NAME of a model} data=${3:?OWNER/NAME of a dataset} to=${4:?OWNER/NAME to upload to}

exec hf jobs run --flavor a10g-small --timeout 4h --secrets HF_TOKEN \
    --env "URL=$url" --env "MODEL=$model" --env "DATASET=$data" --env "TO=$to" \
    python:3.12 bash -euc '
pip install "minitune[hf,parquet] @ git+$URL"
python -m minitune download "$MODEL" --to model
python -m minitune download "$DATASET" --dataset --to data
python -m minitune sft model.path=model data.train.path=data out=runs
hf upload "$TO" runs/sft/deltas
'
