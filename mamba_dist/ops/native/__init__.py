"""Compiling and loading the C++ kernels of the `cpu` backend; the kernels lie beside their ops."""
