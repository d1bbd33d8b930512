"""Who computes the forces: scheduler, workers and the wire between them. Knows no i-PI."""
