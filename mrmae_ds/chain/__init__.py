"""The chain of jobs behind a table: what waits for what, what is there already; on Slurm or on one machine."""
