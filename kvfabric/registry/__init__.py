"""Epochs, tenants, templates, audit log: what must not be stale. One interface, one home each."""
