// Sums of squares without rounding: fixed-point numbers wide enough for every sum that there is.
//
// The square of a float32 is a 48-bit integer times 2^(2q), of which the smallest is 2^-298 and the
// largest is below 2^256. A sum is kLimbs integers: limb k counts units of 2^(32k - 298). Only the
// last limb grows beyond 32 bits of its own, so sums below 2^309 fit (2^53 elements of the largest
// magnitude), and so do sums of rows in any number up to 2^30. Integer addition is associative: the
// limbs, canonical once carries are propagated, do not depend on the order of the elements.
#pragma once

#include "macros.h"

namespace torchao8 {

constexpr int kLimbs = 18;
constexpr int kLimbBits = 32;
constexpr int kLowestBit = -298;  // exponent of limb 0's unit
constexpr int64_t kLimbMask = (int64_t(1) << kLimbBits) - 1;

TORCHAO8_HD constexpr double bits_double(uint64_t u) {
  return __builtin_bit_cast(double, u);
}
TORCHAO8_HD constexpr uint64_t double_bits(double x) {
  return __builtin_bit_cast(uint64_t, x);
}

// The position of a squared mantissa's lowest bit, counted from limb 0's unit. The exponent is the
// float's biased one, 0 to 254.
// Subnormal numbers (0) have the scale of the smallest normal ones.
TORCHAO8_HD constexpr int bit_of_square(int exponent) {
  return 2 * (exponent > 1 ? exponent - 1 : 0);
}
// A finite float's mantissa as an integer.
TORCHAO8_HD constexpr uint32_t mantissa_of(uint32_t magnitude) {
  return (magnitude & 0x7fffffu) | (magnitude >= 0x800000u ? 0x800000u : 0u);
}

// Adds value * 2^bit (bit 0 is limb 0's unit) to up to three neighbouring limbs, through
// add(k, addend). All but the last of them get less than 2^32; the last limb of all takes what is
// above it.
template <class Add>
TORCHAO8_HD void add_at(int64_t value, int bit, Add add) {
  int k = bit / kLimbBits, shift = bit % kLimbBits;
  for (int n = 0; n < 2 && k < kLimbs - 1; n++) {
    add(k++, int64_t(uint64_t(value) << shift) & kLimbMask);
    value >>= kLimbBits - shift;
    shift = 0;
  }
  if (value != 0) add(k, int64_t(uint64_t(value) << shift));
}

// Propagates carries: limbs but the last come into [0, 2^32).
TORCHAO8_HD void make_canonical(int64_t* limbs) {
  int64_t carry = 0;
  for (int k = 0; k < kLimbs - 1; k++) {
    const int64_t limb = limbs[k] + carry;
    limbs[k] = limb & kLimbMask;
    carry = limb >> kLimbBits;
  }
  limbs[kLimbs - 1] += carry;
}

// The float64 nearest to a sum, ties to even; NaN where the sum is negative, which no sum of
// squares is. The limbs need not be canonical. All in integers, and no array: a GPU would put it
// into memory.
TORCHAO8_HD double round_sum(const int64_t* limbs) {
  // From the lowest digit up: the last three digits and whether anything below them is set, kept at
  // the highest digit that is not zero.
  uint64_t digits[3] = {0, 0, 0}, found[3] = {0, 0, 0};
  bool below = false, found_below = false;
  int highest = 0;
  const auto push = [&](uint64_t digit, int k) TORCHAO8_LAMBDA {
    below = below || digits[0] != 0;
    digits[0] = digits[1];
    digits[1] = digits[2];
    digits[2] = digit;
    if (digit == 0) return;
    for (int i = 0; i < 3; i++) found[i] = digits[i];
    found_below = below;
    highest = k;
  };
  int64_t carry = 0;
  for (int k = 0; k < kLimbs - 1; k++) {
    const int64_t limb = limbs[k] + carry;
    push(uint64_t(limb & kLimbMask), k);
    carry = limb >> kLimbBits;
  }
  const int64_t last = limbs[kLimbs - 1] + carry;  // two digits
  if (last < 0) return bits_double(0x7ff8000000000000u);
  push(uint64_t(last & kLimbMask), kLimbs - 1);
  push(uint64_t(last >> kLimbBits), kLimbs);
  if (found[2] == 0) return 0;

  // The leading one to bit 63 of `high`.
  int zeros = 0;
  while (!(found[2] << zeros & 0x80000000u)) zeros++;
  const uint64_t all = found[2] << 32 | found[1], low = found[0] << zeros;
  const uint64_t high = all << zeros | low >> 32;
  const uint64_t rest = (high & 0x7ffu) << 1 | ((low & 0xffffffffu) != 0 || found_below);
  const uint64_t mantissa = high >> 11;  // 53 bits, the first a one
  const bool up = rest > 0x800u || (rest == 0x800u && (mantissa & 1));
  // The mantissa's first bit adds one to the exponent, and so does a carry out of it.
  const int exponent = kLowestBit + kLimbBits * highest + 31 - zeros;
  return bits_double((uint64_t(exponent + 1022) << 52) + mantissa + (up ? 1 : 0));
}

}  // namespace torchao8
