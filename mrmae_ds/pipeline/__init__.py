"""The pipeline of jobs behind a table: dependencies, completed jobs, Slurm and local execution."""
