"""The locality-aware HTTP front door of kvfabric."""
