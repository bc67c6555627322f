"""The arithmetic of the exact profile (docs/exact.md) as pure functions: what a verifier needs to redo any operation of a stage."""
