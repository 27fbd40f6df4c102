#include "rules/sgd.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::SgdRule<true, false>>;
template struct torchao8::cuda::BlockKernels<torchao8::SgdRule<true, false>,
                                             torchao8::DynamicFormat>;
