"""Tiers: media of one node that hold parts. One interface (`base`), one file per medium."""
