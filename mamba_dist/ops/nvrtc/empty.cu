// Nothing: whether this compiles tells whether the compiler is whole and knows the device.
#include "device.cuh"

struct Call {};

KERNEL(empty) {}
