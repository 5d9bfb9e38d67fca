"""What is known of a GPU, and who tells: NVIDIA's driver, or nvidia-smi live or kept. Knows nothing of a fleet."""
