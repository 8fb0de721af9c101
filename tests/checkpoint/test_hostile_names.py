"""Names in a weight index that point out of their folder, as a downloaded model may hold them: none is opened."""

import json
from pathlib import Path

import pytest

from minitune.checkpoint.weight_files import weight_files
from minitune.errors import InputError

OUT = ("..", "../x", "../../x", "../../../../etc/passwd", "a/../../x", "./../x", "../secret", "a/b/../../../secret", "..//secret")
ROOTED = ("/", "/etc/passwd", "//etc/passwd", "///x", "/proc/self/mem", "/dev/zero", "/tmp/x", "/secret", "/../secret", "/.")
WINDOWS = ("C:x", "C:\\x", "c:/x", "D:", "\\x", "\\\\host\\share\\x", "//host/share/x", "\\\\?\\C:\\x", "\\\\.\\pipe\\x", "..\\x")
DEVICES = ("CON", "nul", "aux.safetensors", "COM1", "LPT1.safetensors", "CLOCK$", "x.safetensors:stream", "x.", "x ", " ")
INSIDE = ("a/b", "a/secret", "./x", ".", "", "a//b", "sub/model.safetensors", "sub/", "link/secret", "~/x", "~root/x", "~")
ODD = ("\0", "x\0y", "x\n", "\u202ex", "\u2215etc", "%2e%2e/x", "$HOME/x", "${PATH}", "*", "?", "|cat x", "x" * 300, "x" * 10**6)
NAMES = (*OUT, *ROOTED, *WINDOWS, *DEVICES, *INSIDE, *ODD)


def test_there_are_sixty_and_more() -> None:
    assert len(set(NAMES)) >= 60


@pytest.mark.parametrize("name", NAMES, ids=[f"{i}" for i in range(len(NAMES))])
def test_a_hostile_name_is_refused_and_shortened(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "model.safetensors").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(InputError) as refused:
        weight_files(folder)
    assert len(str(refused.value)) < 1000
