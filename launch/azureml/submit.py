"""Fine-tune in Azure ML: finds or makes data, environment and compute, submits a job file, shows
its log, registers the model that it made and brings it here.

python launch/azureml/submit.py --compute gpu --input model=smollm --input train=train
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Where the model lies: a job keeps its ./outputs as artifacts, a pipeline has an output "model".
MADE = {
    "job.yml": "azureml://jobs/{job}/outputs/artifacts/paths/outputs/sft/merged",
    "pipeline.yml": "azureml://jobs/{job}/outputs/model",
}
INSTALL = "azure-ai-ml or azure-identity is not installed, expected both"


class SubmitError(Exception):
    """What the user must change, in one sentence."""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(prog="submit", description=__doc__)
    add = parser.add_argument
    add("--job", choices=sorted(MADE), default="job.yml", help="job file beside this program")
    add("--input", action="append", default=[], metavar="NAME=FOLDER", help="an input of the job")
    add("--compute", default="gpu", help="name of a compute cluster")
    add("--size", help="kind of machine, to make the cluster where there is none")
    add("--register", default="minitune", metavar="NAME", help="name of the model asset")
    add("--download", type=Path, metavar="FOLDER", help="bring the registered model here")
    add("--subscription", help="with the two below, in place of a config.json of the workspace")
    add("--resource-group")
    add("--workspace")
    return parser.parse_args(words)


def inputs_of(words: Sequence[str]) -> dict[str, Path]:
    """Folders by the names of the inputs that they are for."""
    folders = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not folder or not Path(folder).is_dir():
            raise SubmitError(
                f"--input {word} is no NAME=FOLDER, expected a folder; correct the path"
            )
        folders[name] = Path(folder)
    return folders


def connect(given: argparse.Namespace) -> Any:
    """Client of the workspace that the arguments or a config.json name."""
    from azure.ai.ml import MLClient
    from azure.identity import DefaultAzureCredential

    logging.getLogger("azure.identity").setLevel(logging.ERROR)  # a fault is told by explained
    credential = DefaultAzureCredential()
    place = (given.subscription, given.resource_group, given.workspace)
    if all(place):
        return MLClient(credential, *place)
    if any(place):
        raise SubmitError(
            "--subscription, --resource-group and --workspace go together; give all three"
        )
    return MLClient.from_config(credential)


def found_or_made(find: Callable[[], Any], make: Callable[[], Any]) -> Any:
    """What find gives, or what make gives where the workspace has none."""
    from azure.core.exceptions import ResourceNotFoundError

    try:
        return find()
    except ResourceNotFoundError:
        return make()


def content(folder: Path) -> str:
    """Version of a data asset: the same files have the same one, and are uploaded once."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def data_asset(client: Any, name: str, folder: Path) -> Any:
    """Data asset that holds the files of a folder."""
    from azure.ai.ml.entities import Data

    asset = Data(name=f"minitune-{name}", version=content(folder), path=folder, type="uri_folder")
    return found_or_made(
        lambda: client.data.get(asset.name, version=asset.version),
        lambda: client.data.create_or_update(asset),
    )


def environment(client: Any) -> Any:
    """The newest environment "minitune", made of environment.yml where there is none."""
    from azure.ai.ml import load_environment

    return found_or_made(
        lambda: client.environments.get("minitune", label="latest"),
        lambda: client.environments.create_or_update(load_environment(HERE / "environment.yml")),
    )


def compute(client: Any, name: str, size: str | None) -> Any:
    """The cluster of that name, made of up to one machine of that size where there is none."""
    from azure.ai.ml.entities import AmlCompute

    def make() -> Any:
        if size is None:
            message = f"--compute {name} is not in the workspace, expected a cluster of it"
            raise SubmitError(f"{message}; correct the name, or give --size to make it")
        made = AmlCompute(name=name, size=size, min_instances=0, max_instances=1)
        return client.compute.begin_create_or_update(made).result()

    return found_or_made(lambda: client.compute.get(name), make)


def prepared(client: Any, given: argparse.Namespace, folders: dict[str, Path]) -> Any:
    """The job of the file, with its inputs and its compute, whose parts are in the workspace."""
    from azure.ai.ml import Input, load_job

    job = load_job(HERE / given.job)
    unknown = sorted(folders.keys() - job.inputs.keys())
    if unknown:
        message = f"--input {unknown[0]} is not in {given.job}, expected one of {[*job.inputs]}"
        raise SubmitError(f"{message}; correct the name")
    compute(client, given.compute, given.size)
    environment(client)
    for name, folder in folders.items():
        asset = data_asset(client, name, folder)
        job.inputs[name] = Input(type="uri_folder", path=asset.id, mode="ro_mount")
    if given.job == "pipeline.yml":
        job.settings.default_compute = given.compute
    else:
        job.compute = given.compute
    return job


def submit(client: Any, given: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Run the job to its end, register its model, and download that if it is asked for."""
    from azure.ai.ml.entities import Model

    begun = client.jobs.create_or_update(prepared(client, given, folders))
    print(f"{begun.name}: {begun.studio_url}")
    client.jobs.stream(begun.name)
    path = MADE[given.job].format(job=begun.name)
    model = Model(name=given.register, path=path, type="custom_model")
    model = client.models.create_or_update(model)
    print(f"registered {model.name}:{model.version}")
    if given.download is not None:
        client.models.download(model.name, version=model.version, download_path=given.download)
        print(f"downloaded to {given.download}")


def main(words: Sequence[str] | None = None) -> None:
    """Do all of it; a fault ends the process with exit code 2 and one sentence."""
    given = parse(words)
    try:
        folders = inputs_of(given.input)
        explained(lambda: submit(connect(given), given, folders))
    except SubmitError as fault:
        print(f"submit: {fault}", file=sys.stderr)
        sys.exit(2)


def explained(act: Callable[[], None]) -> None:
    """Do it; SubmitError for what Azure ML or its packages refuse."""
    try:
        from azure.ai.ml.exceptions import JobException, MlException
        from azure.core.exceptions import AzureError, ClientAuthenticationError
        from azure.identity import CredentialUnavailableError
    except ImportError:
        raise SubmitError(f"{INSTALL}; pip install 'minitune[azure]'") from None
    try:
        act()
    except (ClientAuthenticationError, CredentialUnavailableError) as error:
        raise SubmitError(
            f"no credentials ({first_line(error)}), expected a login; az login"
        ) from error
    except (AzureError, JobException, MlException, OSError) as error:
        message = f"Azure ML refused ({first_line(error)}), expected a workspace that has this"
        raise SubmitError(f"{message}; see the names, or config.json of the workspace") from error


def first_line(error: Exception) -> str:
    """The first line of a message, which in Azure's says what it is about."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    main()
