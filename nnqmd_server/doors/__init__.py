"""How i-PI asks for forces."""
