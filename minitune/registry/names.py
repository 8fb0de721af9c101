"""Names of registered models, REGISTRY:NAME:VERSION, and the registries that they are of."""

import re
from typing import NamedTuple

from minitune.errors import InputError
from minitune.io.paths import is_registered_name, locate
from minitune.registry.azure_models import AzureModels
from minitune.registry.hub_models import HubModels
from minitune.registry.mlflow_models import MlflowModels, is_registered
from minitune.registry.versions import LATEST
from minitune.registry.wandb_models import WandbModels

REGISTRIES = {
    "mlflow": MlflowModels,
    "wandb": WandbModels,
    "azureml": AzureModels,
    "hf": HubModels,
}
# what each registry takes for a name
NAMES = {
    "mlflow": (r"[^/:]+", "NAME"),
    "wandb": (r"([^/:]+/)?[^/:]+/[^/:]+", "[ENTITY/]PROJECT/NAME"),
    "azureml": (r"[\w.-]+", "NAME"),
    "hf": (r"[\w.-]+/[\w.-]+", "OWNER/NAME"),
}
VERSION = re.compile(r"[\w.-]+", re.ASCII)


class Name(NamedTuple):
    """Name of a registered model, and the version of it: a number or an alias."""

    registry: str
    name: str
    version: str = LATEST

    @property
    def model(self) -> str:
        """Name without the version, as a program writes it."""
        return f"{self.registry}:{self.name}"

    def opened(self) -> MlflowModels | WandbModels | AzureModels | HubModels:
        """Registry that the name is of."""
        return REGISTRIES[self.registry]()


def parsed(text: str) -> Name:
    """Name that a text holds, one without a registry being of MLflow; InputError for another
    spelling."""
    registry, colon, rest = text.partition(":")
    if registry not in REGISTRIES or not colon:
        registry, rest = "mlflow", text
    name, _, version = rest.partition(":")
    pattern, wanted = NAMES[registry]
    if not re.fullmatch(pattern, name) or not VERSION.fullmatch(version or LATEST):
        spelled = f"{registry}:{wanted} or {registry}:{wanted}:VERSION"
        raise InputError(
            f"registry: {text!r} is no name of a model, expected {spelled}; correct it"
        )
    return Name(registry, name, version or LATEST)


def spelled_out(text: str) -> str:
    """Text with its registry, mlflow:NAME:VERSION, where it is the bare name of a model in MLflow's
    registry and nothing of that name lies here; any other text as it is."""
    name, colon, version = text.partition(":")
    fits = re.fullmatch(r"[^/:\\]+", name) and (VERSION.fullmatch(version) or not colon)
    if is_registered_name(text) or not fits or locate(text).exists():
        return text
    whole = f"mlflow:{text}"
    try:
        return whole if is_registered(name) else text
    except InputError:
        # no server answers: a version, or what was fetched earlier, can only be of the registry
        return whole if colon or locate(whole).is_dir() else text
