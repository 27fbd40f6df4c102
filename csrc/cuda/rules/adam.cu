#include "rules/adam.h"

#include "cuda/compile_kernels.cuh"

template struct torchao8::cuda::Kernels<torchao8::AdamRule<false, false>>;
