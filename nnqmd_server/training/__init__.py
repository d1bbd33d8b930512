"""Training of Allegro and Allegro-Legato networks."""
