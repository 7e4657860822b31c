"""From a data set's name to batches of images: folders on disk, splits, decoding."""
