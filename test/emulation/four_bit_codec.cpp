// The 4-bit codec as functions that Python can call: a library for test_four_bit_codec.py.
#include "formats/four_bit.h"

using namespace torchao8;

extern "C" {
void decode_squares(const uint8_t* codes, int64_t n, float* values) {
  for (int64_t i = 0; i < n; i++) values[i] = FourBitSquares::decode(codes[i]);
}
void decode_levels(const uint8_t* codes, int64_t n, float* values) {
  for (int64_t i = 0; i < n; i++) values[i] = FourBitLevels::decode(codes[i]);
}
void encode_squares(const float* x, const uint32_t* hashes, int64_t n, float inverse,
                    uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t added = hashes ? FourBitSquares::draw(hashes[i]) : FourBitSquares::kHalf;
    codes[i] = uint8_t(FourBitSquares::encode(x[i], inverse, added));
  }
}
void encode_levels(const float* x, const uint32_t* hashes, int64_t n, float inverse,
                   uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) {
    codes[i] = uint8_t(hashes ? FourBitLevels::encode(x[i], inverse, FourBitLevels::draw(hashes[i]))
                              : FourBitLevels::encode(x[i], inverse));
  }
}
void scales_of_squares(const float* extremes, int64_t n, float unit, float* scale, float* inverse) {
  for (int64_t i = 0; i < n; i++) {
    scale[i] = FourBitSquares::scale_of(extremes[i], unit);
    inverse[i] = FourBitSquares::inverse_of(scale[i], unit);
  }
}
void scales_of_levels(const float* highest, const float* lowest, int64_t n, float unit,
                      float* scale, float* inverse) {
  for (int64_t i = 0; i < n; i++) {
    scale[i] = FourBitLevels::scale_of(highest[i], lowest[i], unit);
    inverse[i] = FourBitLevels::inverse_of(scale[i], unit);
  }
}
// Of all 16 codes.
void roots(float scale, float* root, float* reciprocal) {
  const FourBitRoots of(scale);
  for (uint32_t code = 0; code < 16; code++) {
    root[code] = of.root(code);
    reciprocal[code] = of.reciprocal_of_root(code);
  }
}
}
