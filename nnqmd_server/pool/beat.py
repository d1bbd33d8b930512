"""How pool and workers notice that the other side is gone."""

BEAT = 1.0
"""How often pool and workers let each other know that they are there [s]."""

LIVENESS = 3
"""So many beats without a sign of life, and the other side is taken for gone."""
