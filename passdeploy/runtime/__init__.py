"""Seeds, devices, files, progress events, distributed training, the CUDA driver and package versions."""
