"""The packages: what is in them, installed into fresh systems, upgraded, removed."""
