#include "rules/sgd.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/four_bit.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::SgdRule<true, false>,
                                             torchao8::FourBitFormat>;
