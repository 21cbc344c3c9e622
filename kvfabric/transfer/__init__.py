"""Bytes of blocks between machines: UCX, and who asks whom for what."""
