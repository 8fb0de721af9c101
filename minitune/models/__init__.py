"""Models: families of decoders, opened from a Hugging Face folder or a shape file.

`load("demo")` reads the model and its weights; `open` reads the model alone.
"""

from typing import TYPE_CHECKING, Any

from minitune.models.model import Model as Model
from minitune.models.open import FAMILIES as FAMILIES
from minitune.models.open import config_json as config_json
from minitune.models.open import from_hf as from_hf
from minitune.models.open import open as open
from minitune.models.open import open_config as open_config
from minitune.models.probe import Probe as Probe

if TYPE_CHECKING:
    from minitune.checkpoint.hf_folder import load as load


def __getattr__(name: str) -> Any:
    """Name from another room: `load`, whose file imports the models and so can't be imported before
    them.
    """
    if name == "load":
        from minitune.checkpoint.hf_folder import load

        return load
    raise AttributeError(f"module 'minitune.models' has no attribute {name!r}")
