"""Launches jobs on several hosts: scripts and manifests for schedulers, from a job's TOML file."""
