"""Make `python -m millpond` the same as the command `millpond`."""

from millpond.pipeline.cli.main import main

main()
