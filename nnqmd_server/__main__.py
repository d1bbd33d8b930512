"""``python -m nnqmd_server`` is ``nnqmd`` of this Python."""

from nnqmd_server.cli import main

main()
