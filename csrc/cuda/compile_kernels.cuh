// Compiles the kernels of the rule, and of the format, that a file of rules/ names:
//     template struct torchao8::cuda::ElementKernels<torchao8::LionRule>;
//     template struct torchao8::cuda::BlockKernels<torchao8::LionRule, torchao8::DynamicFormat>;
#pragma once

#include "cuda/kernels.cuh"

namespace torchao8::cuda {

static_assert(int(FloatType::kFloat32) == 0 && int(FloatType::kBFloat16) == 1 &&
              int(FloatType::kFloat16) == 2);

template <class Rule, class Format, class T, bool kRounds>
constexpr typename BlockKernels<Rule, Format>::Step block_step_kernels() {
  constexpr size_t kShared = sizeof(SharedOfBlocks<Format, Rule, kRounds>);
  typename BlockKernels<Rule, Format>::Step k = {
      {step_blocks<Rule, T, Blocks::kShort, kRounds, Format>, kShared},
      {step_blocks<Rule, T, Blocks::kSpan, kRounds, Format>, kShared},
      {step_blocks<Rule, T, Blocks::kLong, kRounds, Format>, kShared},
      {}};
  if constexpr (!Format::kBlocksOnly)
    k.one_scale = {step_one_scale<Rule, T, kRounds, Format>, kShared};
  return k;
}

template <class Rule, class T, class Format>
constexpr auto find_extremes_kernel() {
  return Kernel<Table<Rule, ExtremesEntryOf<Rule>>, const TablesOf<Format>*>{
      find_extremes<Rule, T, Format>, sizeof(SharedOfExtremes<Format, Rule>)};
}

template <class Rule, class Format>
constexpr BlockKernels<Rule, Format> block_kernels() {
  BlockKernels<Rule, Format> k = {{block_step_kernels<Rule, Format, float, false>(),
                                   block_step_kernels<Rule, Format, BFloat16, false>(),
                                   block_step_kernels<Rule, Format, Half, false>()},
                                  block_step_kernels<Rule, Format, BFloat16, true>(),
                                  {},
                                  {}};
  if constexpr (!Format::kBlocksOnly) {
    k.extremes[0] = find_extremes_kernel<Rule, float, Format>();
    k.extremes[1] = find_extremes_kernel<Rule, BFloat16, Format>();
    k.extremes[2] = find_extremes_kernel<Rule, Half, Format>();
    k.write_scales = {write_scales<Rule, Format>, 0};
  }
  return k;
}

template <class Rule>
constexpr ElementKernels<Rule> element_kernels() {
  constexpr size_t kShared = sizeof(SharedOfElements<Rule>);
  ElementKernels<Rule> k = {{{step_elements<Rule, float, false>, kShared},
                             {step_elements<Rule, BFloat16, false>, kShared},
                             {step_elements<Rule, Half, false>, kShared}},
                            {step_elements<Rule, BFloat16, true>, kShared},
                            {}};
  if constexpr (kScalarsOf<Rule> > 0) k.write_scalars = {write_scalars<Rule>, 0};
  return k;
}

template <class Rule, class Format>
const BlockKernels<Rule, Format> BlockKernels<Rule, Format>::all = block_kernels<Rule, Format>();
template <class Rule>
const ElementKernels<Rule> ElementKernels<Rule>::all = element_kernels<Rule>();

}  // namespace torchao8::cuda
