"""``python -m capray``."""

from capray.cli import main

main()
