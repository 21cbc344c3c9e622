"""Deterministic simulation: the product's own code on a virtual clock, network and disk."""
