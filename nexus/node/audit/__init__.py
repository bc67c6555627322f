"""Audits: both ends of `/nexus/audit/1`."""
