#include "rules/rmsprop.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/mulaw.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::RmspropRule<false, false>,
                                             torchao8::MulawFormat>;
