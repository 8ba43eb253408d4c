"""CUDA kernels without a CUDA toolkit: compiled by NVRTC, launched through the driver."""
