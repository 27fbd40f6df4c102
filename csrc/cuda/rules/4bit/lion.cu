#include "rules/lion.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/four_bit.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::LionRule, torchao8::FourBitFormat>;
