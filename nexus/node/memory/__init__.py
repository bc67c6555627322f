"""The shared memory of a node: its own blocks and those of the collections that it follows, searched here and over the network."""
