"""One file per trajectory format: text or binary in, `source.Source` out, in the file's own units."""
