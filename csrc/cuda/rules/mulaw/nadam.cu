#include "rules/nadam.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/mulaw.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::NadamRule, torchao8::MulawFormat>;
