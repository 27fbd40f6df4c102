#include "rules/sgd.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::SgdRule<true, true>>;
template struct torchao8::cuda::BlockKernels<torchao8::SgdRule<true, true>,
                                             torchao8::DynamicFormat>;
