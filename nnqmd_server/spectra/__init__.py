"""From trajectories to the spectra that an instrument would show."""
