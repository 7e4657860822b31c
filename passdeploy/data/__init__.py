"""Data sets: finding their images on disk, train and test splits, decoding, batches."""
