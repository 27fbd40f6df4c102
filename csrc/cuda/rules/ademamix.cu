#include "rules/ademamix.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::AdemamixRule>;
template struct torchao8::cuda::BlockKernels<torchao8::AdemamixRule, torchao8::DynamicFormat>;
