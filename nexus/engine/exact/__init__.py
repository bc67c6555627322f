"""The exact profile: docs/exact.md is the arithmetic; every implementation of it here gives the same bits."""
