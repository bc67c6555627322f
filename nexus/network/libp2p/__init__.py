"""The real network: libp2p over TCP, Noise and Yamux. Only this package imports libp2p."""

from nexus.network.libp2p.adapter import Caps, NetworkOptions, open_libp2p

__all__ = ["Caps", "NetworkOptions", "open_libp2p"]
