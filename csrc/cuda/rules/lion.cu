#include "rules/lion.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::LionRule>;
template struct torchao8::cuda::BlockKernels<torchao8::LionRule, torchao8::DynamicFormat>;
