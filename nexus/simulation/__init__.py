"""Whole nodes in a seeded, deterministic simulation: virtual time, a network, disks and processors that fail on schedule.

See docs/simulation.md. Nothing of a node is changed for it: what a simulation replaces are the edges of the process, all of them in
`nexus.simulation.determinism` (scheduler, threads), `.disk` (SQLite and small files) and `.compute` (how long things take).
"""
