// The tables behind the CPU's codec, built once, from common/dynamic_map.h.
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

struct CodecTables {
  float map[2][256];  // [signed][code]: the codebook
  DecodeLines decode[2];
  PositionLines position[2];
  alignas(64) uint32_t nearest[2][kAllCells] = {};

  CodecTables();
};

const CodecTables& codec_tables();

}  // namespace torchao8
