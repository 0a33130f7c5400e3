"""One sample from disk to tensors. Read in this order: source, order, encode, pack, lane, batch, pool, loader."""
