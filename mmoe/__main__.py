"""Runs the command line as `python -m mmoe`."""

from mmoe.commands.main import main

main()
