"""Debian's own slurmctld, slurmd and slurmstepd in namespaces, and the Slurm backend against them."""
