"""What `m1-info` says of a machine, an installation and a checkpoint."""
