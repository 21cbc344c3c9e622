"""What a node keeps, for whom, and until when. `store.BlockStore` is the way in."""
