// The tables behind the CPU's codec, built once, from codec/dynamic_map.h.
#pragma once

#include <cstdint>

#include "codec/dynamic_map.h"

namespace torchao8 {

// Decoding: value = fma(a, kk, b), with the line (a, b) looked up by the exponent of kk. The vector
// paths hold kk times a power of two, chosen so that exponents fall on 1..7 and what is left over
// (zero and 1.0) on index 0 (mod 8); `a` is divided by it, which is exact.
struct DecodeLines {
  alignas(64) float a[16];
  alignas(64) float b[16];
};

// Nearest rounding without the words' gather. In the decade whose codes' kk have f bits,
//     z = y * slope + 8/9 = (kk + 1/2) / 2^(f-1)
// lies between 1 and 2, and kk is the top f bits of its significand. Decades begin at the exact
// thresholds. Within one, z decides but where it is within kNearTie units in its last place, 2^-23,
// of the next kk (or, in the shorter decades, a little farther above one), which is left to the
// words: the rounding of slope, sum and codebook moves z by no more than three. (Of all floats, by
// less than two.)
constexpr int kNearTie = 4;
struct NearestLines {
  // Of two binades, [2^(2j-31), 2^(2j-29)), where j is bits(y) >> 24 modulo 16: the bits of the
  // decade in which they begin. Twice, for a look-up in each half of a register.
  alignas(32) uint8_t bits[32] = {};
  alignas(32) float next_start[8];  // of the decade with one bit more, by bits modulo 8
  alignas(32) float slope[8];       // by bits modulo 8
  float floor;                      // what is smaller has the code of this
};

struct CodecTables {
  float map[2][256];  // [signed][code]: the codebook
  DecodeLines decode[2];
  PositionLines position[2];
  NearestLines nearest_lines[2];
  alignas(64) uint32_t nearest[2][kAllCells] = {};

  CodecTables();
};

const CodecTables& codec_tables();

}  // namespace torchao8
