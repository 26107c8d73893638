"""`python -m pipeline.cli` is `millpond`."""

from pipeline.cli.main import main

main()
