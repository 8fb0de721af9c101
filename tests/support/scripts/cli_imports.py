"""A command of minitune with the words given: its exit code, first line, whether torch was there then, modules, graphs."""

import json
import sys
from typing import Any

from minitune.__main__ import main


class Out:
    """A stdout that keeps what is written first, and whether torch was imported by then."""

    first: tuple[str, bool] | None = None

    def write(self, text: str) -> None:
        """Keep the first text."""
        self.first = self.first or (text, "torch" in sys.modules)

    def flush(self) -> None:
        """Nothing is kept back."""


stdout, out = sys.stdout, Out()
written: Any = out
sys.stdout = written
code = main(sys.argv[1:])
sys.stdout = stdout
dynamo = sys.modules.get("torch._dynamo.utils")
n_graphs = 0 if dynamo is None else sum(dynamo.counters["stats"].values())
assert out.first is not None
print(json.dumps([code, *out.first, sorted(sys.modules), n_graphs]))
