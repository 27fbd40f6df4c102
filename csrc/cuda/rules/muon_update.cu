#include "rules/muon.h"

#include "cuda/compile_kernels.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::MuonUpdateRule>;
