"""The dashboard and the rules: as generated, sound by themselves, and answered by a real Prometheus."""
