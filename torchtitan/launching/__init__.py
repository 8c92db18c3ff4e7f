"""Jobs of several hosts: scripts and manifests for schedulers, from the TOML file of a job."""
