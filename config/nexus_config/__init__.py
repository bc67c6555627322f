"""Settings of a node: defaults, the data directory's config.toml, the environment and flags."""
