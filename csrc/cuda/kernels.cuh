// The kernels of a rule as the host knows them: their addresses, and what they need. The files of
// rules/ compile the kernels (compile_kernels.cuh); steps.cu launches them (step_engine.cuh).
//
// nvcc takes a quarter of a second for a kernel, and four seconds to read torch's headers. So the
// kernels are compiled in parallel, in a file for each rule and format, and without torch's
// headers.
#pragma once

#include "cuda/one_scale.cuh"

namespace torchao8::cuda {

template <class... Parameters>
struct Kernel {
  void (*function)(Parameters...);
  size_t shared_bytes;
};

// Those of state in a format. Rules without states have none. A format that has only blocks with
// scales of their own lacks the kernels of one scale.
template <class Rule, class Format>
struct BlockKernels {
  using Tables = const TablesOf<Format>*;
  // For fast entries of one type.
  struct Step {
    Kernel<Table<Rule, BlockEntryOf<Rule>>, Tables> short_blocks, spans, long_blocks;
    Kernel<Table<Rule, OneScaleEntryOf<Rule>>, Tables> one_scale;
  };
  Step step[3];  // by FloatType
  Step rounded;  // of bfloat16 parameters, rounded stochastically
  Kernel<Table<Rule, ExtremesEntryOf<Rule>>, Tables> extremes[3];  // by FloatType
  Kernel<Table<Rule, ScalesEntryOf<Rule>>> write_scales;

  static const BlockKernels all;
};

// Those of 32-bit state, and of scalar states.
template <class Rule>
struct ElementKernels {
  template <bool kRounds>
  using Step = Kernel<Table<Rule, ElementEntryOf<Rule, kRounds>>>;
  Step<false> step[3];  // by FloatType
  Step<true> rounded;   // of bfloat16 parameters, rounded stochastically
  Kernel<Table<Rule, ScalarsEntryOf<Rule>>> write_scalars;

  static const ElementKernels all;
};

}  // namespace torchao8::cuda
