// Scales of blocks, and whole blocks quantized to nearest and back.
#pragma once

namespace torchao8::TORCHAO8_ISA::dynamic {

template <bool kSigned>
TORCHAO8_COLD inline void clear_codes(uint8_t* codes, int length) {
  std::memset(codes, zero_code<kSigned>(), size_t(length));
}

// The scale to store. Where there is none, it is zero, or NaN if the block is not finite, and the
// codes are those of zero. kEncoded: the encoder has already written zero codes for a block of
// zeros.
template <bool kSigned, bool kEncoded>
TORCHAO8_HD float final_scale(float extreme, float unit, int length, uint8_t* codes) {
  if (has_scale<kSigned>(extreme, unit)) return extreme * unit;
  if (kEncoded && extreme == 0.0f && usable<kSigned>(extreme)) return 0.0f;
  clear_codes<kSigned>(codes, length);
  return scale_of<kSigned>(extreme, unit);
}

// Below, n is any length: what does not fill a vector is padded with zeros.

template <bool kSigned>
float quantize_block(const float* x, int n, uint8_t* codes) {
  const NearestEncoder<kSigned> encode(codec_tables());
  scalar::Extreme<kSigned> extremes;
  for (int i = 0; i < n; i++) extremes.add(x[i]);
  float extreme = extremes.result(), factor = 1.0f;
  if (!usable<kSigned>(extreme) && std::isfinite(extreme))
    factor = 0.25f;  // its inverse would be subnormal
  const float inverse = inverse_of<kSigned>(extreme * factor);
  if (inverse == 0.0f) return final_scale<kSigned, false>(extreme, 1.0f, n, codes);
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) encode(load(x + i) * F(factor), inverse, codes + i);
  if (i < n) {
    float tail[kWidth] = {};
    uint8_t tail_codes[kWidest];
    std::memcpy(tail, x + i, size_t(n - i) * sizeof(float));
    encode(load(tail) * F(factor), inverse, tail_codes);
    std::memcpy(codes + i, tail_codes, size_t(n - i));
  }
  if (!kSigned && factor != 1.0f) {  // the factor takes the smallest numbers to zero; none may be
    for (i = 0; i < n; i++) codes[i] = x[i] > 0.0f && codes[i] == 0 ? 1 : codes[i];
  }
  return extreme;
}

template <bool kSigned>
void dequantize_block(const uint8_t* codes, int n, float scale, float* x) {
  const Decoder<kSigned> decode(codec_tables());
  int i = 0;
  for (; i + kWidest <= n; i += kWidth) store(x + i, decode(codes + i) * F(scale));
  if (i < n) {
    float tail[2 * kWidest];
    uint8_t tail_codes[3 * kWidest] = {};
    std::memcpy(tail_codes, codes + i, size_t(n - i));
    for (int j = 0; j < n - i; j += kWidth) store(tail + j, decode(tail_codes + j) * F(scale));
    std::memcpy(x + i, tail, size_t(n - i) * sizeof(float));
  }
}

}  // namespace torchao8::TORCHAO8_ISA::dynamic
