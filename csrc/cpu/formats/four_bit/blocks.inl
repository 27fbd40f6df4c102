// The 4-bit format on the vector paths: all of it by the scalar code.
#pragma once

#include "cpu/kernel_tables.h"

namespace torchao8::TORCHAO8_ISA::four_bit {

// Only a format with more than blocks has one: see instances.inl.
template <class Rule>
struct StateDecoder;

template <class Rule, class T>
void step_blocks_of(const Rule& rule, const BlockRun& run) {
  const auto& step = block_kernels<Rule>(scalar_kernels<FourBitFormat>()).step;
  (std::is_same_v<T, float> ? step.float32 : step.bfloat16)(rule, run);
}

template <bool kSigned>
float quantize_block(const float* x, int n, uint8_t* codes) {
  return scalar_kernels<FourBitFormat>().codec.quantize[kSigned](x, n, codes);
}

template <bool kSigned>
void dequantize_block(const uint8_t* codes, int n, float scale, float* x) {
  scalar_kernels<FourBitFormat>().codec.dequantize[kSigned](codes, n, scale, x);
}

}  // namespace torchao8::TORCHAO8_ISA::four_bit
