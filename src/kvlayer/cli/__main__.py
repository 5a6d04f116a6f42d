"""``python -m kvlayer.cli``: the program without its console script."""

from kvlayer.cli.main import main

main()
