"""What this node remembers of the shared memory: blocks and their proofs in SQLite, vectors and indexes that follow from them."""
