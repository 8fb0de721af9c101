"""Steps of .ci/run: the files that it names are there, and a torch that can't be had is one line and not the end."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPT = (ROOT / ".ci" / "run").read_text("utf-8")
FAKE_PYTHON = """#!/bin/sh
case "$*" in "-m pytest"*) echo "newest $*"; exit "$TESTS_FAIL" ;; esac
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin" "$3/lib/python3.11/site-packages" && echo "PATH=$3/bin:$PATH; export PATH" > "$3/bin/activate"
cp "$0" "$3/bin/python"
cp "$0" "$3/bin/pytest"
cat > "$3/bin/pip" << 'end'
#!/bin/sh
case "$*" in
  "index "*) echo "$VERSIONS"; exit "$NO_INDEX" ;;
  *">=2.14"*) exit "$NO_WHEEL" ;;
esac
end
chmod +x "$3/bin/pip"
"""


def test_the_files_that_it_names_are_there() -> None:
    paths = re.findall(r"tests/\S+\.py", SCRIPT)
    assert len(paths) > 3
    assert not [path for path in paths if not (ROOT / path).is_file()]


@pytest.mark.parametrize(
    ("how", "line", "code"),
    [
        ({"VERSIONS": "2.13.0"}, "the index has none or can't be reached", 0),
        ({"NO_INDEX": "1", "VERSIONS": ""}, "the index has none or can't be reached", 0),
        ({"NO_WHEEL": "1"}, "it could not be installed", 0),
        ({}, "newest -m pytest", 0),
        ({"TESTS_FAIL": "1"}, "tests fail with torch 2.14", 1),
    ],
)
def test_the_newest_torch_is_tested_where_it_can_be_had(tmp_path: Path, how: dict[str, str], line: str, code: int) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "scratch").mkdir()
    python = tmp_path / "bin" / "python3.11"
    python.write_text(FAKE_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "scratch")}
    env |= {"VERSIONS": "2.14.1, 2.13.0", "NO_INDEX": "0", "NO_WHEEL": "0", "TESTS_FAIL": "0", **how}
    result = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert line in output, output
    assert result.returncode == code, output
    assert not list((tmp_path / "scratch").iterdir())
