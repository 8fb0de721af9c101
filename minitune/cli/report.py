"""Verbs report and watch: the page of runs as a file, and live on this machine."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from minitune.cli.command_result import CommandResult
from minitune.cli.options import typed_name
from minitune.errors import InputError
from minitune.programs.page.curves import library
from minitune.programs.page.page import FILE, page, write_page
from minitune.programs.page.run_files import RunFiles, read_run

REFRESH_S = 10  # after which a page that is watched is loaded again


def report(words: Sequence[str]) -> CommandResult:
    """Write the page of a run into its folder, or that of several runs beside each other."""
    parser = argparse.ArgumentParser(
        prog=f"{typed_name()} report",
        description="Write report.html: curves, figures, samples and advice of a run; of several "
        "runs, how they differ and which came furthest.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where the page is written")
    given = parser.parse_args(words)
    runs = [read_run(folder) for folder in given.runs]
    if len(runs) == 1 and given.to is None:
        path = write_page(runs[0])
    else:
        path = given.to or Path(FILE)
        if given.to is None and path.exists():
            raise InputError(f"report: {path} exists, expected a new file; name one with --to")
        path.write_text(page(labelled(runs)), encoding="utf-8")
    sys.stdout.write(f"{path}\n")
    return CommandResult({"path": str(path)})


def labelled(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Runs by their names, or by their folders where two have the same name."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return dict(zip(names, runs, strict=True))
    return {str(run.folder): run for run in runs}


def watch(words: Sequence[str]) -> CommandResult:
    """Serve the page of a run on this machine until Ctrl-C; returns where it was."""
    parser = argparse.ArgumentParser(
        prog=f"{typed_name()} watch",
        description="Show the page of a run in a browser on this machine, while it trains.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1; 0: any free one")
    given = parser.parse_args(words)
    read_run(given.run)
    try:
        server = server_of(given.run, given.port)
    except OSError as error:
        raise InputError(
            f"watch: port {given.port} can't be used ({error}), expected a free one; choose "
            "another with --port"
        ) from None
    address = f"http://127.0.0.1:{server.server_address[1]}"
    sys.stdout.write(f"{address}, until Ctrl-C\n")
    sys.stdout.flush()
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return CommandResult({"address": address})


def server_of(folder: Path, port: int) -> ThreadingHTTPServer:
    """Server of a run's page at 127.0.0.1, which reads the run's files for every request."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Page, folder))


class _Page(BaseHTTPRequestHandler):
    """Answers to a browser: the page, and the library that draws it."""

    def __init__(self, folder: Path, *args: object) -> None:
        self._folder = folder
        super().__init__(*args)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        """CommandResult / with the page as it is now, and /plotly.js with the library."""
        if self.path == "/plotly.js":
            self._answer(library(), "text/javascript", seconds=3600)
        elif self.path == "/":
            run = read_run(self._folder)
            refresh_s = 0 if run.is_finished else REFRESH_S
            html = page({run.name: run}, script="/plotly.js", refresh_s=refresh_s)
            self._answer(html, "text/html; charset=utf-8")
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are not told on the terminal."""

    def _answer(self, text: str, kind: str, seconds: int = 0) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", f"max-age={seconds}")
        self.end_headers()
        self.wfile.write(content)
