"""LoRA on a GPU of Modal: modal run launch/modal_app.py --words "sft model.path=/data/model ..."

Files go there and back with modal volume put minitune FOLDER, and modal volume get minitune runs.
"""

import shlex
import subprocess

import modal

HOURS = 60 * 60
app = modal.App("minitune")
image = modal.Image.from_dockerfile("launch/Dockerfile", context_dir=".")
volume = modal.Volume.from_name("minitune", create_if_missing=True)


# A call that is preempted or runs out of time is made again, and the same command continues.
@app.function(image=image, gpu="A10G", volumes={"/data": volume}, timeout=4 * HOURS, retries=3)
def train(words: list[str]) -> None:
    """Run a program of minitune; its run is kept in the volume, also when it is stopped."""
    try:
        subprocess.run(["python", "-m", "minitune", *words, "out=/data/runs"], check=True)
    finally:
        volume.commit()


@app.local_entrypoint()
def main(words: str = "sft model.path=/data/model data.train.path=/data/train.jsonl") -> None:
    """Send the words of a command line to Modal and show what is printed there."""
    train.remote(shlex.split(words))
