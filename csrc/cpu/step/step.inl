// The loops over memory, written once for every instruction set and rule. An isa_*.cpp includes
// this after the vector type F and the codec of its set, with TORCHAO8_ISA naming their namespace.
//
// A block takes two passes. The first decodes the state, computes the new moments into buffers in
// the first-level cache and finds the extreme elements; the second updates the parameter and
// encodes. The second pass of a block and the first of the next one run in one loop (blocks.inl).
//
// On the vector paths a block with an element that is not usable (a gradient that is NaN or
// infinite, or whose square overflows) is found after the first pass, when nothing has been
// written, and left to the scalar path, which selects for each element. The common case pays
// nothing for it.
#pragma once

#include "cpu/step/blocks.inl"
#include "cpu/step/elements.inl"
#include "cpu/step/encode.inl"
#include "cpu/step/extremes.inl"
#include "cpu/step/measure.inl"
#include "cpu/step/memory.inl"
#include "cpu/step/moments.inl"
#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA {

template <class Rule>
constexpr StepKernels<Rule> make_step_kernels() {
  StepKernels<Rule> kernels = {
      nullptr, nullptr, step_elements<Rule, float>, step_elements<Rule, BFloat16>,
      nullptr, nullptr};
  if constexpr (Rule::kStates > 0) {
    kernels.blocks_float32 = step_blocks_of<Rule, float>;
    kernels.blocks_bfloat16 = step_blocks_of<Rule, BFloat16>;
    kernels.extremes_float32 = find_extremes<Rule, float>;
    kernels.extremes_bfloat16 = find_extremes<Rule, BFloat16>;
  }
  return kernels;
}

}  // namespace torchao8::TORCHAO8_ISA
