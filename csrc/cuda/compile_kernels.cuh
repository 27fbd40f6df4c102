// Compiles the kernels of the rule that a file of rules/ names:
//     template struct torchao8::cuda::Kernels<torchao8::LionRule>;
#pragma once

#include "cuda/kernels.cuh"

namespace torchao8::cuda {

template <class Rule, class T, bool kRounds>
constexpr StepKernels<Rule, kRounds> step_kernels() {
  StepKernels<Rule, kRounds> k = {};
  k.elements = {step_elements<Rule, T, kRounds>, sizeof(SharedOfElements<Rule>)};
  if constexpr (Rule::kStates > 0) {
    using Shared = SharedOfBlocks<Rule, kRounds>;
    k.blocks.short_blocks = {step_blocks<Rule, T, Blocks::kShort, kRounds>, sizeof(Shared)};
    k.blocks.spans = {step_blocks<Rule, T, Blocks::kSpan, kRounds>, sizeof(Shared)};
    k.blocks.long_blocks = {step_blocks<Rule, T, Blocks::kLong, kRounds>, sizeof(Shared)};
    k.blocks.one_scale = {step_one_scale<Rule, T, kRounds>, sizeof(Shared)};
  }
  return k;
}

template <class Rule, class T>
constexpr ExtremesKernel<Rule> extremes_kernel() {
  if constexpr (Rule::kStates > 0) return {find_extremes<Rule, T>, sizeof(SharedOfExtremes<Rule>)};
  return {};
}

template <class Rule>
constexpr Kernels<Rule> all_kernels() {
  static_assert(int(FloatType::kFloat32) == 0 && int(FloatType::kBFloat16) == 1 &&
                int(FloatType::kFloat16) == 2);
  Kernels<Rule> k = {{step_kernels<Rule, float, false>(), step_kernels<Rule, BFloat16, false>(),
                      step_kernels<Rule, Half, false>()},
                     step_kernels<Rule, BFloat16, true>(),
                     {extremes_kernel<Rule, float>(), extremes_kernel<Rule, BFloat16>(),
                      extremes_kernel<Rule, Half>()},
                     {},
                     {}};
  if constexpr (Rule::kStates > 0) k.write_scales = {write_scales<Rule>, 0};
  if constexpr (kScalarsOf<Rule> > 0) k.write_scalars = {write_scalars<Rule>, 0};
  return k;
}

template <class Rule>
const Kernels<Rule> Kernels<Rule>::all = all_kernels<Rule>();

}  // namespace torchao8::cuda
