// The tables behind the codec, built once from the arithmetic of common/dynamic_map.h.
#pragma once

#include <cstdint>

#include "common/dynamic_map.h"

namespace torchao8 {

// Decoding: value = fma(a, kk, b), with the line (a, b) looked up by the exponent of kk. The vector
// paths hold kk times a power of two, chosen so that exponents fall on 1..7 and what is left over
// (zero and 1.0) on index 0 (mod 8); `a` is divided by it, which is exact.
struct DecodeLines {
  alignas(64) float a[16];
  alignas(64) float b[16];
};

// Nearest rounding: one look-up. The top 16 bits of y pick a cell, no cell holds two midpoints, and
// the cell's word is such that (word + bits(y)) >> 16 is the code:
//     word = (code at the cell's start << 16) + 65536 - (low bits of the midpoint) - (cell << 16).
// The thresholds are exact: the first float at or above the real midpoint of two codebook values
// gets the upper code. Cells of a negative y give minus its code in the upper word, the word's
// magnitude being the code for all cells. The unsigned table never gives 0.
constexpr uint32_t kCells = 0x3f81;          // [1.0, 1.0078) is the last one
constexpr uint32_t kNegativeCells = 0x8000;  // where those of a negative y begin
constexpr uint32_t kAllCells = 0x10000;      // so that no y, not even NaN, reads past the table

// Stochastic rounding (unsigned only): the real-valued position of y between the codes, to which a
// random number is added before truncation. Position is piecewise linear in y: class d is decade d
// and the gap below it. A code step in the decade is 5 times one of the decade below, and the gap
// is the mean of the two, so that the gap's line is 5/3 as steep and meets the decade's at its
// first code; the lower of the two lines holds. Class 7 is the gap between the last decade and 1.0.
//     line = fma(y, a[d], b[d]), position = min(line, fma(line, 5/3, c[d])) = code - 1
constexpr float kGapSlope = 5.0f / 3.0f;
// Is part of every y, so that its exponent is one of the 32 that the cells below tell apart; the
// lines take it out again. A 700th of the smallest code.
constexpr float kPositionBias = 4.656612873077393e-10f;  // 2^-31
struct PositionLines {
  // The class's first value, the last code of the decade below; and infinity.
  alignas(32) float start[9];
  alignas(32) float a[8], b[8], c[8];
  // The first float whose position is not below that of code 1. What is smaller has position 0: a
  // second moment is never rounded to zero.
  float floor;

  // The same lines without a search for d: the two binades [2^(2j-31), 2^(2j-29)), j being
  // bits(y) >> 24 modulo 16, hold at most one start (or the floor). The lines of what lies below it
  // are number 16 + j, those of the rest number j.
  alignas(64) float cell_start[16];
  alignas(64) float cell_a[32], cell_b[32], cell_c[32];
};

struct CodecTables {
  float map[2][256];  // [signed][code]: the codebook
  DecodeLines decode[2];
  PositionLines position;
  alignas(64) uint32_t nearest[2][kAllCells] = {};

  CodecTables();
};

const CodecTables& codec_tables();

}  // namespace torchao8
