"""The registry of a fleet, on a Redis that nodes and routers share (`--directory`)."""
