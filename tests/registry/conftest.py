"""A server of our own in the Hub's place."""

from collections.abc import Iterator

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from support.hub_server import NEEDED, NOT_NEEDED, Hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({**NEEDED, **NOT_NEEDED})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # which no server of ours speaks
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    yield hub
    hub.close()
    if shown:
        enable_progress_bars()
