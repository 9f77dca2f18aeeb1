"""A real SLURM on one host, for the tests."""
