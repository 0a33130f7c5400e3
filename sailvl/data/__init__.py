"""One sample from disk to tensors. Read in this order: source, conversation, order, encode, pack, ready, lane,
batch, pool, loader; parquet and webdataset are further sources."""
