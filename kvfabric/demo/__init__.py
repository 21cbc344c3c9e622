"""`kvfabric demo`: the whole fabric as real processes on one machine, replaying a real request log."""
