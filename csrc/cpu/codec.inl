// Blocks and their scales, for every instruction set, and the codec by itself. An isa_*.cpp
// includes this after the vector type F and the codec of its set, with TORCHAO8_ISA naming their
// namespace.

namespace torchao8::TORCHAO8_ISA {

// Whether a number can be a block's extreme element: below 2^126, and not negative in an unsigned
// state. The bits of a negative number, and of NaN, are above those of 2^126.
template <bool kSigned>
TORCHAO8_HD bool usable(float x) {
  return (float_bits(x) & (kSigned ? 0x7fffffffu : 0xffffffffu)) < float_bits(kOverflow);
}

// What a block's values are multiplied by before encoding: zero where its scale counts as zero, or
// cannot be one (a corrupt state stays visibly corrupt).
template <bool kSigned>
TORCHAO8_HD float inverse_of(float extreme) {
  if (!usable<kSigned>(extreme) || std::fabs(extreme) < kMinScale) return 0.0f;
  return 1.0f / extreme;
}

// Whether a block of this extreme element, in these units, has a scale: neither it nor the scale is
// too large, or so small that the scale counts as zero.
template <bool kSigned>
TORCHAO8_HD bool has_scale(float extreme, float unit) {
  const auto within = [](float x) TORCHAO8_LAMBDA {
    const uint32_t magnitude = float_bits(x) & 0x7fffffffu, least = float_bits(kMinScale);
    return magnitude - least < float_bits(kOverflow) - least;
  };
  return within(extreme) && within(extreme * unit) && usable<kSigned>(extreme);
}

// The scale to store. Where there is none, it is zero, or NaN if the block is not finite, and so
// are all codes.
template <bool kSigned>
TORCHAO8_HD float final_scale(float extreme, float unit, int length, uint8_t* codes) {
  if (has_scale<kSigned>(extreme, unit)) return extreme * unit;
  std::memset(codes, zero_code<kSigned>(), size_t(length));
  return usable<kSigned>(extreme) && usable<true>(extreme * unit) ? 0.0f : bits_float(0x7fc00000u);
}

// Below, n is any length: what does not fill a vector is padded with zeros.

template <bool kSigned>
float quantize_block(const CodecTables& tables, const float* x, int n, uint8_t* codes) {
  const NearestEncoder<kSigned> encode(tables);
  scalar::Extreme<kSigned> extremes;
  for (int i = 0; i < n; i++) extremes.add(x[i]);
  float extreme = extremes.result(), factor = 1.0f;
  if (!usable<kSigned>(extreme) && std::isfinite(extreme))
    factor = 0.25f;  // its inverse would be subnormal
  const float inverse = inverse_of<kSigned>(extreme * factor);
  if (inverse == 0.0f) return final_scale<kSigned>(extreme, 1.0f, n, codes);
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
void dequantize_block(const CodecTables& tables, const uint8_t* codes, int n, float scale,
                      float* x) {
  const Decoder<kSigned> decode(tables);
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

template <class T>
void widen_as(const void* from, int64_t n, float* to) {
  const T* x = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(x + i));
  for (; i < n; i++) to[i] = scalar::load(x + i);
}

template <class T>
void narrow_as(const float* from, int64_t n, void* to) {
  T* x = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, load(from + i));
  for (; i < n; i++) scalar::store(x + i, from[i]);
}

inline void widen(FloatType type, const void* from, int64_t n, float* to) {
  switch (type) {
    case FloatType::kFloat32:
      return widen_as<float>(from, n, to);
    case FloatType::kBFloat16:
      return widen_as<BFloat16>(from, n, to);
    case FloatType::kFloat16:
      return widen_as<Half>(from, n, to);
  }
}

inline void narrow(FloatType type, const float* from, int64_t n, void* to) {
  switch (type) {
    case FloatType::kFloat32:
      return narrow_as<float>(from, n, to);
    case FloatType::kBFloat16:
      return narrow_as<BFloat16>(from, n, to);
    case FloatType::kFloat16:
      return narrow_as<Half>(from, n, to);
  }
}

constexpr CodecKernels make_codec_kernels() {
  return {{quantize_block<false>, quantize_block<true>},
          {dequantize_block<false>, dequantize_block<true>},
          widen,
          narrow};
}

}  // namespace torchao8::TORCHAO8_ISA
