"""i-PI inputs: read, check, run."""
