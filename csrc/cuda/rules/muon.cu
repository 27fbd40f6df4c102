#include "rules/muon.h"

#include "cuda/compile_kernels.cuh"
#include "cuda/formats/dynamic.cuh"

template struct torchao8::cuda::ElementKernels<torchao8::MuonRule>;
template struct torchao8::cuda::BlockKernels<torchao8::MuonRule, torchao8::DynamicFormat>;
