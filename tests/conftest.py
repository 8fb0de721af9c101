"""What holds for every test: signatures are checked, no cache of the user is touched, nothing leaves the machine."""

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# Here and not in a fixture: huggingface_hub and wandb read their variables when they are imported, which is at collection.
SCRATCH = Path(tempfile.mkdtemp(prefix="minitune-tests-"))
FOLDERS = (
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "HF_HOME",
    "WANDB_DIR",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_DATA_DIR",
)
for variable in FOLDERS:
    folder = SCRATCH / variable.lower()
    folder.mkdir()
    os.environ[variable] = str(folder)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with all cores each would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

pytest.register_assert_rewrite("support")

# Before the first import of the package: a module that is already imported would go unchecked.
if any(name.partition(".")[0] == "minitune" for name in sys.modules):
    raise RuntimeError("conftest: minitune was imported before its signatures could be checked")
from support import signatures  # noqa: E402  (its assertions are rewritten)

signatures.install()
import torch  # noqa: E402  (after the environment is set)

from support.ranks import Ranks  # noqa: E402

# deadline and too_slow measure the machine, and a shared machine is no property of the code.
# Without the phase that explains a failure: it traces every line that runs, which takes minutes under checked signatures.
settings.register_profile(
    "default",
    max_examples=25,
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, under `-m fast`, the files without that mark: importing what they compare with takes longer than the tests."""
    if config.option.markexpr != "fast" or collection_path.suffix != ".py":
        return None
    return True if "pytest.mark.fast" not in collection_path.read_text("utf-8") else None


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection of this process that is neither a local socket nor the loopback interface."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise ConnectionRefusedError(f"tests: a connection to {address[0]}, expected none; tests are offline")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        yield


@pytest.fixture(autouse=True)
def checked_calls() -> None:
    """Begin to count the calls whose signatures are checked."""
    signatures.Calls.test += 1


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Give the next test the thread count and the default dtype that this one found."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and the demo's tokenizer, and a few rows of the demo's data and of prose."""
    from support.programs import write_tiny  # here, because it imports transformers, which a run of a few tests does without

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that call functions as the ranks of a group."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Function that has the process get SIGTERM when the row of a step is logged, once."""
    from minitune.programs.log import Log

    def stop_at(step: int) -> None:
        metrics = Log.metrics

        def with_signal(self: Log, at: int, values: Any) -> None:
            metrics(self, at, values)
            if at == step:
                monkeypatch.setattr(Log, "metrics", metrics)
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Log, "metrics", with_signal)

    return stop_at
