"""The node daemon: composes store, registry, events and tiers, and serves engines and administrators."""
