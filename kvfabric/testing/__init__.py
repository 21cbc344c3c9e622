"""Test suites and fixtures that ship with the package, for whoever implements one of its interfaces."""
