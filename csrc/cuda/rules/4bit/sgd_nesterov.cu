#include "rules/sgd.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/four_bit.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::SgdRule<true, true>,
                                             torchao8::FourBitFormat>;
