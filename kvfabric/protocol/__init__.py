"""What is on the wire: engine <-> node frames (messages, codec) and the gRPC control plane (proto)."""
