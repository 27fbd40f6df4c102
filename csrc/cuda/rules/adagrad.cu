#include "rules/adagrad.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::AdagradRule>;
template struct torchao8::cuda::BlockKernels<torchao8::AdagradRule, torchao8::DynamicFormat>;
