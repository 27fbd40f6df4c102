// The kernels of a rule as the host knows them: their addresses, and what they need. The files of
// rules/ compile the kernels (compile_kernels.cuh); steps.cu launches them (step_engine.cuh).
//
// nvcc takes a quarter of a second for a kernel, and four seconds to read torch's headers. So the
// kernels are compiled in parallel, in a file for each rule, and without torch's headers.
#pragma once

#include "cuda/one_scale.cuh"

namespace torchao8::cuda {

template <class... Parameters>
struct Kernel {
  void (*function)(Parameters...);
  size_t shared_bytes;
};

// Kernels that step. A rule without states has none of 8-bit state: they are null.
template <class Rule>
struct BlockKernels {
  Kernel<Table<Rule, BlockEntryOf<Rule>>, const Tables*> short_blocks, spans, long_blocks;
  Kernel<Table<Rule, OneScaleEntryOf<Rule>>, const Tables*> one_scale;
};
// For fast entries of one type. kRounds: as in step_blocks.
template <class Rule, bool kRounds>
struct StepKernels {
  BlockKernels<Rule> blocks;
  Kernel<Table<Rule, ElementEntryOf<Rule, kRounds>>> elements;
};

template <class Rule>
using ExtremesKernel = Kernel<Table<Rule, ExtremesEntryOf<Rule>>, const Tables*>;

template <class Rule>
struct Kernels {
  StepKernels<Rule, false> step[3];  // by FloatType
  StepKernels<Rule, true> rounded;   // of bfloat16
  ExtremesKernel<Rule> extremes[3];  // by FloatType
  Kernel<Table<Rule, ScalesEntryOf<Rule>>> write_scales;
  Kernel<Table<Rule, ScalarsEntryOf<Rule>>> write_scalars;

  static const Kernels all;
};

}  // namespace torchao8::cuda
