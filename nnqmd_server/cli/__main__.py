"""``python -m nnqmd_server.cli``: the ``nnqmd`` command in a given interpreter."""

from nnqmd_server.cli import main

main()
