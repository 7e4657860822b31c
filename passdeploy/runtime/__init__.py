"""Services of the process: seeds, devices, files, progress events, distributed processes, versions."""
