#include "rules/adam.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/four_bit.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::AdamRule<true, false>,
                                             torchao8::FourBitFormat>;
