"""What is held where: a node's event stream, and the index a router builds from many of them."""
