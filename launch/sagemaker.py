"""LoRA on a spot GPU of SageMaker: python launch/sagemaker.py IMAGE ROLE s3://BUCKET/FOLDER

IMAGE is launch/Dockerfile, pushed to a registry of your account. FOLDER holds model/ and train/.
The run is written to /opt/ml/checkpoints, which SageMaker copies to FOLDER/runs as it grows and
brings back after an interruption, so that the same command continues.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

CHECKPOINTS = "/opt/ml/checkpoints"
# What SageMaker's own images set, and what this one is given: folders of the channels.
VARIABLES = {
    "SM_CHANNEL_MODEL": "/opt/ml/input/data/model",
    "SM_CHANNEL_TRAIN": "/opt/ml/input/data/train",
}
# minitune puts the variables in place of ${NAME}: no shell takes part.
COMMAND = ["python", "-m", "minitune", "sft"]
WORDS = [
    "model.path=${SM_CHANNEL_MODEL}",
    "data.train.path=${SM_CHANNEL_TRAIN}",
    f"out={CHECKPOINTS}",
]


def job(image: str, role: str, folder: str, name: str) -> dict[str, Any]:
    """Arguments of create_training_job: two channels, checkpoints in S3, spot."""
    return {
        "TrainingJobName": name,
        "RoleArn": role,
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": COMMAND,
            "ContainerArguments": WORDS,
        },
        "Environment": VARIABLES,
        "InputDataConfig": [channel(folder, "model"), channel(folder, "train")],
        "OutputDataConfig": {"S3OutputPath": f"{folder}/output"},
        "CheckpointConfig": {"S3Uri": f"{folder}/runs", "LocalPath": CHECKPOINTS},
        "ResourceConfig": {
            "InstanceType": "ml.g5.xlarge",
            "InstanceCount": 1,
            "VolumeSizeInGB": 100,
        },
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {
            "MaxRuntimeInSeconds": 4 * 60 * 60,
            "MaxWaitTimeInSeconds": 24 * 60 * 60,
        },
    }


def channel(folder: str, name: str) -> dict[str, Any]:
    """A folder of S3 that the job finds in /opt/ml/input/data/NAME."""
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{folder}/{name}/"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def main(words: Sequence[str] | None = None) -> None:
    """Begin the job and print its name; one sentence for a missing package."""
    parser = argparse.ArgumentParser(prog="sagemaker", description=__doc__)
    for argument in ("image", "role", "folder"):
        parser.add_argument(argument)
    given = parser.parse_args(words)
    try:
        import boto3
    except ImportError:
        sys.exit("sagemaker: boto3 is not installed, expected it; pip install boto3")
    name = time.strftime("minitune-%Y-%m-%d-%H-%M-%S")
    begun = job(given.image, given.role, given.folder.rstrip("/"), name)
    boto3.client("sagemaker").create_training_job(**begun)
    print(f"{name} has begun; its run is kept in {begun['CheckpointConfig']['S3Uri']}")


if __name__ == "__main__":
    main()
