// The mu-law codec in vectors: two of them, 32 numbers, at a time. The bits are those of
// formats/mulaw.h. What differs between instruction sets is in avx2.h and avx512.h: how codes
// become numbers and come back, and in which order the numbers lie in a vector.
#pragma once

#include "cpu/kernel_tables.h"
#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA::mulaw {

template <bool kSigned>
using Codec = MulawFormat::Codec<kSigned>;

constexpr int kStep = 2 * kWidth;
static_assert(kStep == MulawFormat::kStep);

// The values at scale 1 of kWidth codes, in an order of T's.
template <bool kSigned, class T>
TORCHAO8_HD F decode(const uint8_t* codes) {
  return Lanes<T>::template decode<kSigned, Codec<kSigned>::kShift>(codes);
}

template <bool kSigned, bool kDraws, class T>
using EncoderOf = Encoder<kSigned, kDraws, Codec<kSigned>::kShift, Lanes<T>>;

// The stored numbers of all states of a rule.
template <class Rule, class T = float>
struct StateDecoder {
  template <class Codes>
  TORCHAO8_HD void operator()(const Codes& codes, int64_t i, F* values) const {
    for_each_state<Rule::kStates>(
        [&](auto s) TORCHAO8_LAMBDA { values[s] = decode<Rule::kSigned[s], T>(codes[s] + i); });
  }
  static TORCHAO8_HD float scale(float stored) { return mulaw_scale(stored); }
  static TORCHAO8_HD float kept(float old) { return clamp_to_usable(old); }
};

template <bool kSigned>
float quantize_block(const float* x, int n, uint8_t* codes) {
  const MulawScale to = mulaw_scale_of_block<kSigned>(x, n);
  if (std::isnan(to.scale)) {
    std::memset(codes, 0, size_t(n));
    return to.scale;
  }
  const Bytes least = all_bytes(uint8_t(to.least_code));
  const auto encode = [&](const float* from, uint8_t* result) TORCHAO8_LAMBDA {
    EncoderOf<kSigned, false, float> encoder;
    for (int half = 0; half < 2; half++)
      encoder.add(half, load(from + half * kWidth), F(to.inverse));
    encoder.store(result, least);
  };
  int i = 0;
  for (; i + kStep <= n; i += kStep) encode(x + i, codes + i);
  if (i < n) {
    float tail[kStep] = {};
    uint8_t tail_codes[kStep];
    std::memcpy(tail, x + i, size_t(n - i) * sizeof(float));
    encode(tail, tail_codes);
    std::memcpy(codes + i, tail_codes, size_t(n - i));
  }
  return to.scale;
}

template <bool kSigned>
void dequantize_block(const uint8_t* codes, int n, float scale, float* x) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, decode<kSigned, float>(codes + i) * F(scale));
  if (i < n) {
    float tail[kWidth];
    uint8_t tail_codes[kWidth] = {};
    std::memcpy(tail_codes, codes + i, size_t(n - i));
    store(tail, decode<kSigned, float>(tail_codes) * F(scale));
    std::memcpy(x + i, tail, size_t(n - i) * sizeof(float));
  }
}

}  // namespace torchao8::TORCHAO8_ISA::mulaw
