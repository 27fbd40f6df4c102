#include "rules/rmsprop.h"

#include "cuda/compile_kernels.cuh"

template struct torchao8::cuda::Kernels<torchao8::RmspropRule<true, true>>;
