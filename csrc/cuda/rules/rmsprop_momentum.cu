#include "rules/rmsprop.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::RmspropRule<false, true>>;
template struct torchao8::cuda::BlockKernels<torchao8::RmspropRule<false, true>,
                                             torchao8::DynamicFormat>;
