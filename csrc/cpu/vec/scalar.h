// The vector interface at width one, in plain C++ that any compiler accepts. It is the definition:
// avx2.h and avx512.h give the same bits, sixteen values at a time.
#pragma once

#include <cstdint>

#include "codec/floats.h"
#include "codec/random.h"
#include "cpu/codec_tables.h"

namespace torchao8::scalar {

using F = float;
constexpr int kWidth = 1;

TORCHAO8_HD F load(const float* x) {
  return *x;
}
TORCHAO8_HD void store(float* x, F v) {
  *x = v;
}
TORCHAO8_HD F load(const BFloat16* x) {
  return to_float(*x);
}
TORCHAO8_HD void store(BFloat16* x, F v) {
  *x = to_bfloat16(v);
}
TORCHAO8_HD F load(const Half* x) {
  return to_float(*x);
}
TORCHAO8_HD void store(Half* x, F v) {
  *x = to_half(v);
}

// For values that are not NaN, or one that came from memory as T: then no payload bits are lost.
template <class T>
TORCHAO8_HD void store_quiet(T* x, F v) {
  store(x, v);
}

// The random numbers of F's elements; stores that round stochastically by them.
using Hashes = uint32_t;
TORCHAO8_HD Hashes load_hashes(const uint32_t* x) {
  return *x;
}
TORCHAO8_HD void store(BFloat16* x, F v, Hashes h) {
  *x = to_bfloat16(v, h);
}
TORCHAO8_HD void store_quiet(BFloat16* x, F v, Hashes h) {
  store(x, v, h);
}

// Lanes below 2^126 in magnitude, so neither NaN nor infinite; unsigned: and not negative.
using Mask = bool;
template <bool kSigned>
TORCHAO8_HD Mask in_range(F v) {
  return (float_bits(v) & (kSigned ? 0x7fffffffu : 0xffffffffu)) < float_bits(kOverflow);
}
TORCHAO8_HD Mask both(Mask a, Mask b) {
  return a && b;
}
TORCHAO8_HD bool all(Mask a) {
  return a;
}
TORCHAO8_HD F select(Mask m, F yes, F no) {
  return m ? yes : no;
}

// The extreme element of a block: the one of largest magnitude, the positive one in a tie. What
// cannot be in a state, NaN and a negative number in an unsigned one, counts as larger than
// anything.
template <bool kSigned>
struct Extreme {
  uint32_t key = 0;  // signed: magnitude first, then whether it is positive
  TORCHAO8_HD void add(F v) {
    const uint32_t u = float_bits(v), k = kSigned ? (u << 1) | (~u >> 31) : u;
    key = k > key ? k : key;
  }
  TORCHAO8_HD float result() const { return bits_float(kSigned ? (key >> 1) | (~key << 31) : key); }
};

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

// The hashes of a block's elements, in order, from the first-th on.
struct RandomStream {
  BlockRandom block;
  uint32_t i;
  TORCHAO8_HD void start(BlockRandom b, uint32_t first = 0) {
    block = b;
    i = first;
  }
  TORCHAO8_HD Hashes next_hashes() { return block(i++); }
  TORCHAO8_HD F next() { return one_to_two(next_hashes()); }
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

}  // namespace torchao8::scalar
