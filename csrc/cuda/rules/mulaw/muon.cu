#include "rules/muon.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/mulaw.cuh"

template struct torchao8::cuda::BlockKernels<torchao8::MuonRule, torchao8::MulawFormat>;
