"""Runs the command line as `python -m mmoe`."""

from mmoe.cli import main

main()
