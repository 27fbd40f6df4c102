// The codec by itself, for every instruction set. An isa_*.cpp includes this after the vector type
// F and the codec of its set, with TORCHAO8_ISA naming their namespace.

namespace torchao8::TORCHAO8_ISA {

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
float quantize_block(const CodecTables& tables, const float* x, int n, uint8_t* codes) {
  const NearestEncoder<kSigned> encode(tables);
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
