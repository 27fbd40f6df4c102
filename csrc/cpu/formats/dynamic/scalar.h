// The codec of the dynamic map at width one, in plain C++ that any compiler accepts. It is the
// definition: avx2.h and avx512.h give the same bits, sixteen values at a time.
#pragma once

#include "cpu/codec_tables.h"
#include "cpu/vec/scalar.h"

namespace torchao8::scalar::dynamic {

template <bool kSigned>
struct Decoder {
  const float* map;
  TORCHAO8_HD explicit Decoder(const CodecTables& t) : map(t.map[kSigned]) {}
  TORCHAO8_HD F operator()(const uint8_t* codes) const { return map[*codes]; }
};

template <bool kSigned>
struct NearestEncoder {
  const uint32_t* words;
  TORCHAO8_HD explicit NearestEncoder(const CodecTables& t) : words(t.nearest[kSigned]) {}
  TORCHAO8_HD void operator()(F x, float inverse, uint8_t* codes) const {
    const uint32_t y = float_bits(x * inverse), code = (words[y >> 16] + y) >> 16;
    if constexpr (kSigned) {
      *codes = uint8_t(code < 0x8000 ? code : 0x10000 - code);
    } else {
      *codes = x == 0.0f ? kZeroCodeUnsigned : uint8_t(code);
    }
  }
};

template <bool kSigned>
struct StochasticEncoder {
  const PositionLines& t;
  TORCHAO8_HD explicit StochasticEncoder(const CodecTables& tables) : t(tables.position[kSigned]) {}
  TORCHAO8_HD void operator()(F x, float inverse, F one_to_two, uint8_t* codes) const {
    float y;
    if constexpr (kSigned) {
      y = fma(std::fabs(x), std::fabs(inverse), kPositionBias);
    } else {
      y = max(fma(x, inverse, kPositionBias), t.floor);
    }
    int d = 0;
    while (d < 7 && y >= t.start[d + 1]) d++;
    const float line = fma(y, t.a[d], t.b[d]), gap = fma(line, kGapSlope, t.c[d]);
    const float position = gap < line ? gap : line;
    const int32_t kk = int32_t(position + one_to_two);
    if constexpr (kSigned) {
      const int32_t minus = int32_t(float_bits(x) ^ float_bits(inverse)) >> 31;  // 0 or -1
      const int32_t most = 128 + minus, magnitude = kk < most ? kk : most;
      *codes = uint8_t(kZeroCodeSigned + ((magnitude ^ minus) - minus));
    } else {
      *codes = x == 0.0f ? kZeroCodeUnsigned : uint8_t(kk);
    }
  }
};

}  // namespace torchao8::scalar::dynamic
