"""Programs that tests run in a process of their own: torch can't trace the checks of signatures that the tests run under."""

import os
import subprocess
import sys

from support.paths import ROOT, TESTS

SCRIPTS = TESTS / "support" / "scripts"


def run_script(name: str, *words: str, **environment: str) -> str:
    """Output of the script of this name in this folder; it must end with 0."""
    path = os.pathsep.join([*filter(None, [environment.pop("PYTHONPATH", "")]), str(ROOT), str(TESTS)])
    path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, **environment, "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / f"{name}.py"), *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert result.returncode == 0, result.stderr
    return result.stdout
