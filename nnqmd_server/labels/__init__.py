"""Labelled frames: read from other programs' files, or computed with an electronic-structure code."""
