"""Texts to vectors: `nexus.engine.embedding.opening.open_embedder` finds the model that a user names. docs/embedding.md."""
