"""The engine side of kvfabric: the engine-neutral connector and the reference engine."""
