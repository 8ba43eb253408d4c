"""bench gpu-*: kernels, training steps and decoding on one GPU, beside mamba-ssm's."""
