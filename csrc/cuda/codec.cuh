// The codec on a GPU: every direction a look-up in shared memory. The same bits as the CPU's
// (cpu/vec_scalar.h is the definition), from the same tables (common/dynamic_map.h).
#pragma once

#include "common/dynamic_map.h"
#include "common/random.h"
#include "cuda/device.cuh"

namespace torchao8::cuda {

// Below these cells every magnitude gets the smallest code: zero's if signed, 1 if not.
constexpr uint32_t kLowestSigned = 0x3480;    // 2^-22
constexpr uint32_t kLowestUnsigned = 0x3500;  // 2^-21

static_assert(rounds_up_from(value_of_code(true, 127), value_of_code(true, 128)) >=
                  bits_float(kLowestSigned << 16) &&
              rounds_up_from(value_of_code(false, 1), value_of_code(false, 2)) >=
                  bits_float(kLowestUnsigned << 16));

struct alignas(16) PositionCell {
  float a, b, c, unused;
};

struct alignas(16) Tables {
  uint32_t nearest_signed[kCells - kLowestSigned];  // of magnitudes
  uint32_t nearest_unsigned[kCells - kLowestUnsigned];
  float map[2][256];  // [signed][code]
  PositionCell position[32];
  float position_start[16];
};

// In a constant expression, so that the tables lie in the program: nothing to set up on a device.
constexpr Tables make_tables() {
  Tables t = {};
  build_nearest_words(t.nearest_signed, true, false, kLowestSigned);
  build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned);
  for (int is_signed = 0; is_signed < 2; is_signed++) {
    for (int code = 0; code < 256; code++) t.map[is_signed][code] = value_of_code(is_signed, code);
  }
  PositionLines lines = {};
  build_position_lines(lines);
  for (int i = 0; i < 32; i++)
    t.position[i] = {lines.cell_a[i], lines.cell_b[i], lines.cell_c[i], 0};
  for (int i = 0; i < 16; i++) t.position_start[i] = lines.cell_start[i];
  return t;
}

template <bool kSigned>
TORCHAO8_HD float decode(const Tables& t, uint32_t code) {
  return t.map[kSigned][code];
}

// Where x is not zero, its bits are a number above any code it can have. A minimum where a branch
// would cost more than what it skips.
TORCHAO8_HD uint32_t zero_stays_zero(uint32_t code, float x) {
  return code < float_bits(x) ? code : float_bits(x);
}

// inverse: of the block's scale, with its sign. |x * inverse| is at most the float above 1, unless
// the state is corrupt: then the code does not matter, but it is looked up inside the table.
template <bool kSigned>
TORCHAO8_HD uint32_t encode_nearest(const Tables& t, float x, float inverse) {
  constexpr uint32_t lowest = kSigned ? kLowestSigned : kLowestUnsigned;
  const uint32_t y = float_bits((Real(x) * Real(inverse)).x);
  uint32_t magnitude = y & 0x7fffffffu;
  if (magnitude < lowest << 16) magnitude = lowest << 16;
  if (magnitude >= kCells << 16) magnitude = (kCells << 16) - 1;
  const uint32_t* words = kSigned ? t.nearest_signed : t.nearest_unsigned;
  const uint32_t code = (words[(magnitude >> 16) - lowest] + magnitude) >> 16;
  if (!kSigned) return zero_stays_zero(code, x);
  // There is no -1.0.
  return y >> 31 ? 254 - (code < 254 ? code : 254) : code;
}

TORCHAO8_HD uint32_t encode_stochastic(const Tables& t, float x, float inverse, float one_to_two) {
  const Real y = fma(Real(x), Real(inverse), Real(kPositionBias));
  const uint32_t cell = float_bits(y.x) >> 24 & 15;
  const PositionCell& lines = t.position[cell + (y.x >= t.position_start[cell] ? 0 : 16)];
  const Real line = fma(y, Real(lines.a), Real(lines.b));
  const Real gap = fma(line, Real(kGapSlope), Real(lines.c));
  const Real position = Real(gap.x < line.x ? gap.x : line.x) + Real(one_to_two);
  return zero_stays_zero(uint32_t(int32_t(position.x)), x);
}

}  // namespace torchao8::cuda
