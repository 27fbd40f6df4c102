// bfloat16 and float16 as bits, converted with round to nearest even and gradual underflow. Not the
// hardware's bfloat16 conversion, which flushes subnormal numbers.
#pragma once

#include "macros.h"

namespace torchao8 {

enum class FloatType : int { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

TORCHAO8_HD float to_float(BFloat16 x) {
  return bits_float(uint32_t(x.bits) << 16);
}

TORCHAO8_HD BFloat16 to_bfloat16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};  // NaN stays NaN, quiet
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

// Rounded stochastically, by the top 16 bits of a hash: away from zero with a chance of exactly
// (low 16 bits of x) / 2^16, so that what is a bfloat16 already stays. As in rounding to nearest,
// infinity follows the largest number, in the place of 2^128.
TORCHAO8_HD BFloat16 to_bfloat16(float x, uint32_t hash) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + (hash >> 16)) >> 16)};
}

TORCHAO8_HD float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) {  // infinity, NaN (made quiet)
    return bits_float(sign | rest | 0x7f800000u | (rest > 0x0f800000u ? 0x400000u : 0));
  }
  // Multiplying by 2^112 moves the exponent's bias and normalizes subnormal numbers, exactly.
  return bits_float(sign | float_bits(bits_float(rest) * 5.192296858534828e33f));
}

TORCHAO8_HD Half to_half(float x) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffffu;
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff))};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and up: infinity
  if (magnitude < 0x38800000u) {  // subnormal: let a float addition round at 2^-24
    const uint32_t sum = float_bits(bits_float(magnitude) + 0.5f);
    return {uint16_t(sign | (sum - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}

}  // namespace torchao8
