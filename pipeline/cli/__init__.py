"""The `sentei` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line; imports wait until a command is chosen, so that `--help` is quick."""
    from sentei.pipeline.cli.app import run

    run()
