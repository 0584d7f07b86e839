"""``python -m steplm``."""

from steplm.cli.app import main

main()
