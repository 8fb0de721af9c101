"""Model family as a value: the config that sets it apart, and how its config.json is read and
written.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minitune.models.config import DecoderConfig
from minitune.models.hf_config import HFConfig

Fields = dict[str, Any]


def _no_fields(*_: Any) -> Fields:
    return {}


class Family(NamedTuple):
    """Declaration of a family; `open.FAMILIES` lists them, and the decoder runs them all.

    read gives the config's fields that a config.json says in the family's own way, write the
    config.json fields that only it has.
    """

    config: type[DecoderConfig]
    hf: HFConfig
    read: Callable[[Mapping[str, Any], str], Fields] = _no_fields
    write: Callable[[Any], Fields] = _no_fields

    @property
    def name(self) -> str:
        """model_type of its config.json."""
        return self.hf.model_type

    def from_hf(self, hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
        """Config of a Hugging Face config.json.

        InputError names a field that is neither handled nor known to be harmless, or is of another
        type.
        """
        fields = self.hf.decoded(hf, where)
        return self.hf.read(self.config, fields, where, **self.read(fields, where))

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """Content of a config.json that transformers 4.x and 5.x read alike."""
        return self.hf.write(config, **self.write(config))
