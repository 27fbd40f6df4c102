// The vector interface at width one, in plain C++ that any compiler accepts. It is the definition:
// avx2.h and avx512.h give the same bits, sixteen values at a time.
#pragma once

#include <cstdint>

#include "codec/block_scale.h"
#include "codec/floats.h"
#include "codec/random.h"

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

}  // namespace torchao8::scalar
