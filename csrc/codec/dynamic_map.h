// The dynamic map of "8-Bit Approximations for Parallelism in Deep Learning" (Dettmers, 2016) in
// the form that "8-bit Optimizers via Block-wise Quantization" (2022) uses, as arithmetic.
//
// With kk = |code - 127| (signed) or code + 1 (unsigned), decade i = 0..6 holds kk in [n, 2n),
// n = 2^i (signed) or 2^(i+1) (unsigned), and
//     value = 10^(i-6) * (0.1 + 0.9 * (kk - n + 0.5) / n) = a[i] * kk + b[i].
// The last kk, 2^7 or 2^8, is 1.0. Signed code 127 and unsigned code 0 are 0.0; there is no -1.0.
// The codebook is what fmaf(a, kk, b) gives: within 1e-6 of the published one.
//
// Everything that engines look up is built here, from this arithmetic, in constant expressions: at
// start-up on the CPU, by the compiler for a GPU.
#pragma once

#include <limits>

#include "macros.h"

namespace torchao8 {

constexpr uint8_t kZeroCodeSigned = 127;
constexpr uint8_t kZeroCodeUnsigned = 0;
constexpr float kMinScale = 1.17549435e-38f;  // smallest normal; a smaller scale counts as zero
constexpr float kOverflow = 8.50705917302346e37f;  // 2^126: above it 1 / scale is subnormal

template <bool kSigned>
constexpr uint8_t zero_code() {
  return kSigned ? kZeroCodeSigned : kZeroCodeUnsigned;
}

constexpr int kDecades = 7;

constexpr int last_kk(bool is_signed) {
  return is_signed ? 128 : 256;
}
constexpr int first_kk(bool is_signed, int decade) {
  return is_signed ? 1 << decade : 2 << decade;
}

struct Line {
  double a, b;
};

// value = a * kk + b in decade i.
constexpr Line decade_line(bool is_signed, int i) {
  constexpr double units[kDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  const double n = first_kk(is_signed, i);
  return {units[i] * 0.9 / n, units[i] * (0.1 + 0.9 * (0.5 - n) / n)};
}

constexpr float value_of_kk(bool is_signed, int kk) {
  if (kk == last_kk(is_signed)) return 1.0f;
  int decade = -1;
  while (decade < kDecades - 1 && kk >= first_kk(is_signed, decade + 1)) decade++;
  if (decade < 0) return 0.0f;
  const Line line = decade_line(is_signed, decade);
  // fmaf(a, kk, b): in double the product and the sum are exact.
  return float(double(float(line.a)) * kk + double(float(line.b)));
}

constexpr float value_of_code(bool is_signed, int code) {
  const int k = is_signed ? code - 127 : code + 1;
  return k < 0 ? -value_of_kk(is_signed, -k) : value_of_kk(is_signed, k);
}

// Nearest rounding: one look-up. The top 16 bits of y pick a cell, no cell holds two midpoints, and
// the cell's word is such that (word + bits(y)) >> 16 is the code:
//     word = (code at the cell's start << 16) + 65536 - (low bits of the midpoint) - (cell << 16).
// The thresholds are exact: the first float at or above the real midpoint of two codebook values
// gets the upper code. Cells of a negative y give minus its code in the upper word, the word's
// magnitude being the code for all cells. The unsigned table never gives 0.
constexpr uint32_t kCells = 0x3f81;          // [1.0, 1.0078) is the last one
constexpr uint32_t kNegativeCells = 0x8000;  // where those of a negative y begin
constexpr uint32_t kAllCells = 0x10000;      // so that no y, not even NaN, reads past the table

// First float that is not below the midpoint of two neighbouring magnitudes.
constexpr float rounds_up_from(float below, float above) {
  const double midpoint = (double(below) + double(above)) / 2;  // exact in double
  const float x = float(midpoint);
  return double(x) < midpoint ? bits_float(float_bits(x) + 1) : x;
}

// Words of the cells from `first_cell`, where no midpoint may lie below, up to kCells, and those of
// the same magnitudes with a minus. The negative codes mirror the positive ones about 127, the code
// of zero, but there is no -1.0: code 0 stands for it.
constexpr void build_nearest_words(uint32_t* words, bool is_signed, bool negative,
                                   uint32_t first_cell) {
  int code = is_signed ? kZeroCodeSigned : 1;  // a second moment is never rounded to zero
  const int last = negative ? 254 : 255;
  uint32_t up = float_bits(
      rounds_up_from(value_of_code(is_signed, code), value_of_code(is_signed, code + 1)));
  for (uint32_t cell = first_cell; cell < kCells; cell++) {
    const uint32_t start_code = uint32_t(negative ? code - 254 : code);  // minus the mirrored one
    uint32_t low = 0x10000;                                              // no midpoint in this cell
    if (code < last && up >> 16 == cell) {
      low = up & 0xffff;
      code++;
      if (code < last)
        up = float_bits(
            rounds_up_from(value_of_code(is_signed, code), value_of_code(is_signed, code + 1)));
    }
    const uint32_t top = (negative ? kNegativeCells : 0) + cell;
    words[cell - first_cell] = (start_code << 16) + 0x10000 - low - (top << 16);
  }
}

// Stochastic rounding: the real-valued position of y between the codes, to which a random number is
// added before truncation. Position is piecewise linear in y: class d is decade d and the gap below
// it. A code step in the decade is 5 times one of the decade below, and the gap is the mean of the
// two, so that the gap's line is 5/3 as steep and meets the decade's at its first code; the lower
// of the two lines holds. Class 7 is the gap between the last decade and 1.0.
//     line = fma(y, a[d], b[d]), position = min(line, fma(line, 5/3, c[d])) = code - 1
// Signed: of magnitudes, and the position is kk - 1. Zero is a code like others, at -1, and class 0
// is the line between it and the first one. There is no -1.0: a negative number beyond the last
// code, -0.993, gets that code. It is not the block's extreme one, which is always +1.0.
constexpr float kGapSlope = 5.0f / 3.0f;
// Is part of every y, so that its exponent is one of the 32 that the cells below tell apart; the
// lines take it out again. A 700th of the smallest code.
constexpr float kPositionBias = 4.656612873077393e-10f;  // 2^-31
struct PositionLines {
  // The class's first value, the last code of the decade below, biased; and infinity.
  alignas(32) float start[kDecades + 2];
  alignas(32) float a[8], b[8], c[8];
  // Unsigned: the first float whose position is not below that of code 1. What is smaller has
  // position 0: a second moment is never rounded to zero. Signed: there is no floor.
  float floor;

  // The same lines without a search for d: the two binades [2^(2j-31), 2^(2j-29)), j being
  // bits(y) >> 24 modulo 16, hold at most one start (or the floor). The lines of what lies below it
  // are number 16 + j, those of the rest number j.
  alignas(64) float cell_start[16];
  alignas(64) float cell_a[32], cell_b[32], cell_c[32];
};

struct Point {
  double value, position;
};

// The line through two codes, in floats, for a y that includes the bias.
constexpr void set_position_line(PositionLines& t, int d, Point from, Point to) {
  const double slope = (to.position - from.position) / (to.value - from.value);
  t.a[d] = float(slope);
  t.b[d] = float(from.position - slope * (from.value + kPositionBias));
}

constexpr void build_position_lines(PositionLines& t, bool is_signed) {
  // The random number that is added lies between 1 and 2. Unsigned: code - 1 = kk - 2.
  const double shift = is_signed ? 1 : 2;
  const auto at = [&](int kk) { return Point{value_of_kk(is_signed, kk), double(kk) - shift}; };
  for (int d = 0; d < kDecades; d++) {
    const int first = first_kk(is_signed, d), last = 2 * first - 1;
    // The first decade of the signed map is a single code: its line comes from zero.
    set_position_line(t, d, first < last ? at(first) : Point{0.0, -1.0}, at(last));
    // Both lines meet at `first`. Class 0 needs no gap, what lies between 0 and the first code
    // being never rounded to 0: with c = 0 the gap's line is the upper one. So it is in class 7.
    // Signed, where positions go down to -1, it takes c = 1.
    t.c[d] = d > 0 ? float(at(first).position * (1.0 - 5.0 / 3.0)) : is_signed ? 1.0f : 0.0f;
    t.start[d] = d > 0 ? float(double(value_of_kk(is_signed, first - 1)) + kPositionBias) : 0.0f;
  }
  // A block's extreme element is 1 - 2^-24, 1 or 1 + 2^-23 when divided by itself and biased. With
  // all random numbers, 1 + 2^-15 to 2 - 2^-15, it must get the last code, so that its position may
  // be no less than that code's minus 2^-15 nor more than it plus one unit in the last place.
  // Unsigned, of slope 284, that is 254 and 2^-16. Signed, of slope 142, it is 127 and 2^-17.
  const int end = last_kk(is_signed);
  const double last = value_of_kk(is_signed, end - 1);
  t.a[kDecades] = float(1.0 / (1.0 - last));
  t.b[kDecades] = float(end - shift - (is_signed ? 0.5 : 1.1) / 65536 - double(t.a[kDecades]));
  t.c[kDecades] = 0.0f;
  t.start[kDecades] = float(last);
  t.start[kDecades + 1] = std::numeric_limits<float>::infinity();
  if (is_signed) {
    t.floor = 0.0f;
  } else {
    t.floor = value_of_kk(false, 2);
    // fma(floor, a, b) < 0, in double, where it is exact enough to have the right sign
    while (double(t.floor) * t.a[0] + t.b[0] < 0) t.floor = bits_float(float_bits(t.floor) + 1);
  }

  // The cells. Class -1 is below the floor, its line zero; there is none if there is no floor.
  const auto start = [&](int d) { return d == 0 ? t.floor : t.start[d]; };
  const auto set = [&](int to, int d) {
    t.cell_a[to] = d < 0 ? 0.0f : t.a[d];
    t.cell_b[to] = d < 0 ? 0.0f : t.b[d];
    t.cell_c[to] = d < 0 ? 0.0f : t.c[d];
  };
  for (int j = 0; j < 16; j++) {
    const float low = bits_float(uint32_t(2 * j + 96) << 23), high = 4 * low;
    int d = -1;
    while (d < kDecades && start(d + 1) <= low) d++;
    const bool inside = start(d + 1) < high;
    t.cell_start[j] = inside ? start(d + 1) : std::numeric_limits<float>::infinity();
    set(16 + j, d);
    set(j, inside ? d + 1 : d);
  }
}

}  // namespace torchao8
