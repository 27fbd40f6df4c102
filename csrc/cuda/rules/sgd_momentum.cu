#include "rules/sgd.h"

#include "cuda/compile_kernels.cuh"

template struct torchao8::cuda::Kernels<torchao8::SgdRule<true, false>>;
