"""kvfabric: a distributed KV-cache tier and prefix-cache fabric for LLM inference fleets."""

__version__ = "0.1.0"
