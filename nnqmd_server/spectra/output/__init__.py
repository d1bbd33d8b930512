"""What leaves the house: labelled arrays, NeXus, tables, OCLIMAX's files, pictures and the report."""
