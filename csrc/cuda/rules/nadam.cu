#include "rules/nadam.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::NadamRule>;
template struct torchao8::cuda::BlockKernels<torchao8::NadamRule, torchao8::DynamicFormat>;
