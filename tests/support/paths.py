"""Places in the repository, found once, so that a test may lie in any folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
PACKAGE = ROOT / "minitune"
