"""Small helpers that know nothing of networks: devices, memory, files, progress, images."""
