#include "rules/sgd.h"

#include "cuda/compile_kernels.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::SgdRule<false, false>>;
