// The mu-law codec in vectors: two of them, 32 numbers, at a time. The bits are those of
// formats/mulaw.h.
#pragma once

#include "cpu/kernel_tables.h"
#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA::mulaw {

template <bool kSigned>
using Codec = MulawFormat::Codec<kSigned>;

constexpr int kStep = 2 * kWidth;
static_assert(kStep == MulawFormat::kStep);

// The values at scale 1 of kWidth codes.
template <bool kSigned>
TORCHAO8_HD F decode(const uint8_t* codes) {
  constexpr int kShift = Codec<kSigned>::kShift;
  constexpr uint32_t kOneBits = Codec<kSigned>::kOneBits;
  if constexpr (kSigned) {
    const U shifted = load_signed_bytes(codes) << kShift;  // the sign ends in the highest bit
    const U magnitude = shifted & lanes_of(Codec<true>::kLast << kShift);
    const F value = float_of(magnitude + lanes_of(kOneBits)) - F(1.0f);
    return float_of(bits_of(value) | (shifted & lanes_of(0x80000000u)));
  } else {
    return float_of((load_bytes(codes) << kShift) + lanes_of(kOneBits)) - F(1.0f);
  }
}

// The stored numbers of all states of a rule.
template <class Rule>
struct StateDecoder {
  template <class Codes>
  TORCHAO8_HD void operator()(const Codes& codes, int64_t i, F* values) const {
    for_each_state<Rule::kStates>(
        [&](auto s) TORCHAO8_LAMBDA { values[s] = decode<Rule::kSigned[s]>(codes[s] + i); });
  }
  static TORCHAO8_HD float scale(float stored) { return mulaw_scale(stored); }
};

// Encodes kStep numbers: add() both vectors, then store().
template <bool kSigned>
struct Encoder {
  using Code = Codec<kSigned>;
  U rounded[2];
  F x[2];

  TORCHAO8_HD Encoder() {}
  static TORCHAO8_HD U half() { return lanes_of(Code::kHalf); }
  static TORCHAO8_HD U draw(Hashes hashes) { return lanes_of(hashes) >> (32 - Code::kShift); }

  // Not less than 0 where unsigned.
  TORCHAO8_HD void add(int which, F v, F inverse, U added) {
    const F size = kSigned ? float_of(bits_of(v) & lanes_of(0x7fffffffu)) : v;
    rounded[which] = (bits_of(fma(size, inverse, F(1.0f))) + added) >> Code::kShift;
    x[which] = v;
  }
  TORCHAO8_HD void store(uint8_t* codes, Bytes least) const {
    constexpr uint32_t kOne = Code::kOneBits >> Code::kShift;
    const Bytes magnitudes = pack_less<kSigned ? 127 : 255>(rounded[0], rounded[1], kOne);
    if constexpr (kSigned) {
      store_bytes(codes, magnitudes | sign_bytes(x[0], x[1]));
    } else {
      store_bytes(codes, max(magnitudes, least));
    }
  }
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
    Encoder<kSigned> encoder;
    for (int half = 0; half < 2; half++)
      encoder.add(half, load(from + half * kWidth), F(to.inverse), encoder.half());
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
  for (; i + kWidth <= n; i += kWidth) store(x + i, decode<kSigned>(codes + i) * F(scale));
  if (i < n) {
    float tail[kWidth];
    uint8_t tail_codes[kWidth] = {};
    std::memcpy(tail_codes, codes + i, size_t(n - i));
    store(tail, decode<kSigned>(tail_codes) * F(scale));
    std::memcpy(x + i, tail, size_t(n - i) * sizeof(float));
  }
}

}  // namespace torchao8::TORCHAO8_ISA::mulaw
