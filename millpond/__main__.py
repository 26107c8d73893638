"""`python -m millpond` is the command `millpond`."""

from millpond.pipeline.cli.main import main

main()
