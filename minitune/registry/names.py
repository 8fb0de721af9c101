"""Names of registered models, REGISTRY:NAME:VERSION, and the registries that they are of."""

import re
from typing import NamedTuple

from minitune.errors import InputError
from minitune.registry.azure_models import AzureModels
from minitune.registry.hub_models import HubModels
from minitune.registry.mlflow_models import MlflowModels
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
