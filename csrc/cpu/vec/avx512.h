// Sixteen floats in an AVX-512 register. VBMI's byte permutation and VNNI's dot product are needed
// too, so this is Ice Lake and later, Zen 4 and later; what has AVX-512 without them takes the AVX2
// path.
// Included inside a region compiled for that target: see isa_avx512.cpp. The arithmetic is that of
// scalar.h.
#pragma once

namespace torchao8::avx512 {

constexpr int kWidth = 16;

struct F {
  __m512 x;
  TORCHAO8_HD F() {}
  TORCHAO8_HD F(__m512 v) : x(v) {}
  TORCHAO8_HD explicit F(float v) : x(_mm512_set1_ps(v)) {}
};
TORCHAO8_HD F operator*(F a, F b) {
  return _mm512_mul_ps(a.x, b.x);
}
TORCHAO8_HD F operator+(F a, F b) {
  return _mm512_add_ps(a.x, b.x);
}
TORCHAO8_HD F operator-(F a, F b) {
  return _mm512_sub_ps(a.x, b.x);
}
TORCHAO8_HD F fma(F a, F b, F c) {
  return _mm512_fmadd_ps(a.x, b.x, c.x);
}
TORCHAO8_HD F sqrt(F a) {
  return _mm512_sqrt_ps(a.x);
}
TORCHAO8_HD F reciprocal(F a) {
  return _mm512_div_ps(_mm512_set1_ps(1.0f), a.x);
}
TORCHAO8_HD F max(F a, F b) {
  return _mm512_max_ps(a.x, b.x);
}
TORCHAO8_HD F sign(F a) {
  const __mmask16 nonzero = _mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  // 1.0 | (a & sign)
  const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1.0f));
  const __m512i x = _mm512_ternarylogic_epi32(one, _mm512_castps_si512(a.x),
                                              _mm512_castps_si512(_mm512_set1_ps(-0.0f)), 0xf8);
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(nonzero, x));
}
TORCHAO8_HD __m512i bits(F a) {
  return _mm512_castps_si512(a.x);
}
// A constant in all lanes. As a float it is broadcast from memory by a load; as an integer GCC
// would move it through a general register and a permutation port.
TORCHAO8_HD __m512i all_lanes(uint32_t x) {
  return _mm512_castps_si512(_mm512_set1_ps(bits_float(x)));
}

// Eight doubles, for sums.
constexpr int kDoubles = 8;
struct Doubles {
  __m512d x;
  TORCHAO8_HD Doubles() {}
  TORCHAO8_HD Doubles(__m512d v) : x(v) {}
  TORCHAO8_HD explicit Doubles(double v) : x(_mm512_set1_pd(v)) {}
};
TORCHAO8_HD Doubles operator+(Doubles a, Doubles b) {
  return _mm512_add_pd(a.x, b.x);
}
TORCHAO8_HD Doubles operator-(Doubles a, Doubles b) {
  return _mm512_sub_pd(a.x, b.x);
}
TORCHAO8_HD Doubles fma(Doubles a, Doubles b, Doubles c) {
  return _mm512_fmadd_pd(a.x, b.x, c.x);
}
TORCHAO8_HD Doubles load_doubles(const float* x) {
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
}
TORCHAO8_HD void store_doubles(double* x, Doubles v) {
  _mm512_store_pd(x, v.x);
}

TORCHAO8_HD F load(const float* x) {
  return _mm512_loadu_ps(x);
}
TORCHAO8_HD void store(float* x, F v) {
  _mm512_storeu_ps(x, v.x);
}

// Byte orders for permutations: byte i of the result comes from byte at[i].
struct ByteOrder {
  alignas(64) uint8_t at[64];
};
// Of each dword `count` bytes from number `first` on, packed together.
constexpr ByteOrder pack_order(int first, int count) {
  ByteOrder order = {};
  for (int i = 0; i < 16 * count; i++) order.at[i] = uint8_t(i / count * 4 + first + i % count);
  return order;
}
// Words to the high halves of dwords (the low halves are to be masked).
constexpr ByteOrder spread_order() {
  ByteOrder order = {};
  for (int i = 0; i < 64; i++) order.at[i] = uint8_t(i / 4 * 2 + i % 2);
  return order;
}
constexpr ByteOrder kLowBytes = pack_order(0, 1), kThirdBytes = pack_order(2, 1),
                    kHighHalves = pack_order(2, 2);
constexpr ByteOrder kSpreadWords = spread_order();
TORCHAO8_HD __m512i load_order(const ByteOrder& order) {
  return _mm512_load_si512(order.at);
}

TORCHAO8_HD F load(const BFloat16* x) {  // each to the high half of a dword
  const __m512i h = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi8(0xccccccccccccccccu, load_order(kSpreadWords), h));
}
TORCHAO8_HD __m512i round_to_bfloat16(__m512i u) {  // in the high halves
  // u + 0x7fff + (u >> 16 & 1), the two summands as words that the dot product with (1, 1) adds
  const __m512i words = _mm512_ternarylogic_epi32(u, all_lanes(0x10000), all_lanes(0x7fff), 0xea);
  return _mm512_dpwssd_epi32(u, words, all_lanes(0x10001));
}
TORCHAO8_HD void store_high_halves(BFloat16* x, __m512i r) {
  const __m512i packed = _mm512_permutexvar_epi8(load_order(kHighHalves), r);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_castsi512_si256(packed));
}
TORCHAO8_HD void store(BFloat16* x, F v) {
  const __mmask16 nan = _mm512_cmp_ps_mask(v.x, v.x, _CMP_UNORD_Q);
  const __m512i r = round_to_bfloat16(bits(v));
  store_high_halves(x, _mm512_mask_or_epi32(r, nan, bits(v), all_lanes(0x400000)));
}
// For values that are not NaN, or one that came from memory as bfloat16, which rounding leaves
// alone.
TORCHAO8_HD void store_quiet(BFloat16* x, F v) {
  store_high_halves(x, round_to_bfloat16(bits(v)));
}
TORCHAO8_HD void store_quiet(float* x, F v) {
  store(x, v);
}

// The random numbers of F's elements; stores that round stochastically by them.
using Hashes = __m512i;
TORCHAO8_HD Hashes load_hashes(const uint32_t* x) {
  return _mm512_loadu_si512(x);
}
TORCHAO8_HD __m512i round_to_bfloat16(__m512i u, Hashes h) {  // in the high halves
  return _mm512_add_epi32(u, _mm512_srli_epi32(h, 16));
}
TORCHAO8_HD void store(BFloat16* x, F v, Hashes h) {
  const __mmask16 nan = _mm512_cmp_ps_mask(v.x, v.x, _CMP_UNORD_Q);
  const __m512i r = round_to_bfloat16(bits(v), h);
  store_high_halves(x, _mm512_mask_or_epi32(r, nan, bits(v), all_lanes(0x400000)));
}
TORCHAO8_HD void store_quiet(BFloat16* x, F v, Hashes h) {
  store_high_halves(x, round_to_bfloat16(bits(v), h));
}
TORCHAO8_HD F load(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
TORCHAO8_HD void store(Half* x, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT));
}

using Mask = __mmask16;
template <bool kSigned>
TORCHAO8_HD Mask in_range(F v) {
  const __m512i u = kSigned ? _mm512_and_si512(bits(v), all_lanes(0x7fffffff)) : bits(v);
  return _mm512_cmplt_epu32_mask(u, all_lanes(0x7e800000));
}
TORCHAO8_HD Mask both(Mask a, Mask b) {
  return Mask(a & b);
}
TORCHAO8_HD bool all(Mask a) {
  return a == 0xffff;
}
TORCHAO8_HD F select(Mask m, F yes, F no) {
  return _mm512_mask_blend_ps(m, no.x, yes.x);
}

// Signed: NaN is not seen here, but in the unsigned moment, which has one wherever a gradient has.
template <bool kSigned>
struct Extreme;
template <>
struct Extreme<true> {
  static constexpr int kLargerMagnitude = 0b0111;  // with its sign; positive in a tie
  __m512 extreme;
  TORCHAO8_HD Extreme() : extreme(_mm512_setzero_ps()) {}
  TORCHAO8_HD void add(F v) { extreme = _mm512_range_ps(v.x, extreme, kLargerMagnitude); }
  TORCHAO8_HD float result() const {
    const __m256 a = _mm256_range_ps(_mm512_castps512_ps256(extreme),
                                     _mm512_extractf32x8_ps(extreme, 1), kLargerMagnitude);
    __m128 b =
        _mm_range_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1), kLargerMagnitude);
    b = _mm_range_ps(b, _mm_movehl_ps(b, b), kLargerMagnitude);
    return _mm_cvtss_f32(_mm_range_ps(b, _mm_movehdup_ps(b), kLargerMagnitude));
  }
};
template <>
struct Extreme<false> {
  __m512i high;
  TORCHAO8_HD Extreme() : high(_mm512_setzero_si512()) {}
  TORCHAO8_HD void add(F v) { high = _mm512_max_epu32(high, bits(v)); }
  TORCHAO8_HD float result() const { return bits_float(_mm512_reduce_max_epu32(high)); }
};

// The hashes of 16 neighbouring elements, two times 8, the first one's number being a multiple
// of 8.
struct RandomStream {
  __m512i h, difference;
  TORCHAO8_HD void start(BlockRandom r, uint32_t first = 0) {
    r = r.from(first / 8);
    const __m512i t =
        _mm512_broadcast_i32x8(_mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneFactors.t)));
    const auto line = [&](uint32_t a, uint32_t b) TORCHAO8_LAMBDA {
      return _mm512_add_epi32(_mm512_set1_epi32(int(a)),
                              _mm512_mullo_epi32(_mm512_set1_epi32(int(b)), t));
    };
    const __m512i step = line(r.c2, r.c3);
    h = line(r.c0, r.c1);
    h = _mm512_mask_add_epi32(h, 0xff00, h, step);
    difference = _mm512_slli_epi32(step, 1);
  }
  TORCHAO8_HD Hashes next_hashes() {
    const __m512i now = h;
    h = _mm512_add_epi32(h, difference);
    return now;
  }
  TORCHAO8_HD F next() {
    // (h & mask) | 1.0
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(next_hashes(), all_lanes(kRandomMask),
                                                         all_lanes(kOneBits), 0xea));
  }
};

// ---- bytes, two vectors of numbers at a time
// -----------------------------------------------------

struct U {  // of unsigned numbers
  __m512i x;
};
TORCHAO8_HD U lanes_of(uint32_t x) {
  return {all_lanes(x)};
}
TORCHAO8_HD U lanes_of(Hashes hashes) {
  return {hashes};
}
TORCHAO8_HD U bits_of(F a) {
  return {bits(a)};
}
TORCHAO8_HD F float_of(U a) {
  return _mm512_castsi512_ps(a.x);
}
TORCHAO8_HD U operator+(U a, U b) {
  return {_mm512_add_epi32(a.x, b.x)};
}
TORCHAO8_HD U operator&(U a, U b) {
  return {_mm512_and_si512(a.x, b.x)};
}
TORCHAO8_HD U operator|(U a, U b) {
  return {_mm512_or_si512(a.x, b.x)};
}
TORCHAO8_HD U operator<<(U a, int n) {
  return {_mm512_slli_epi32(a.x, unsigned(n))};
}
TORCHAO8_HD U operator>>(U a, int n) {
  return {_mm512_srli_epi32(a.x, unsigned(n))};
}
TORCHAO8_HD U load_bytes(const uint8_t* x) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
TORCHAO8_HD U load_signed_bytes(const uint8_t* x) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}

struct Bytes {  // 32
  __m256i x;
};
TORCHAO8_HD Bytes all_bytes(uint8_t x) {
  return {_mm256_set1_epi8(char(x))};
}
TORCHAO8_HD Bytes operator|(Bytes a, Bytes b) {
  return {_mm256_or_si256(a.x, b.x)};
}
TORCHAO8_HD Bytes max(Bytes a, Bytes b) {
  return {_mm256_max_epu8(a.x, b.x)};
}
// Byte number `which` of each dword of two vectors.
constexpr ByteOrder pack_two_order(int which) {
  ByteOrder order = {};
  for (int i = 0; i < 32; i++) order.at[i] = uint8_t(4 * i + which);
  return order;
}
constexpr ByteOrder kLowBytesOfTwo = pack_two_order(0), kHighBytesOfTwo = pack_two_order(3);
TORCHAO8_HD __m256i pack_two(const ByteOrder& order, __m512i a, __m512i b) {
  return _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, load_order(order), b));
}
// Numbers from `less` to 2^31, less that, but at most kMost.
template <int kMost>
TORCHAO8_HD Bytes pack_less(U a, U b, uint32_t less) {
  const __m512i most = all_lanes(less + kMost);
  const __m256i low =
      pack_two(kLowBytesOfTwo, _mm512_min_epu32(a.x, most), _mm512_min_epu32(b.x, most));
  return {_mm256_sub_epi8(low, _mm256_set1_epi8(char(less)))};
}
// The signs, in the highest bits.
TORCHAO8_HD Bytes sign_bytes(F a, F b) {
  return {
      _mm256_and_si256(pack_two(kHighBytesOfTwo, bits(a), bits(b)), _mm256_set1_epi8(char(0x80)))};
}
TORCHAO8_HD void store_bytes(uint8_t* to, Bytes bytes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes.x);
}

// The largest magnitude of many numbers; NaN is above all.
template <class T>
struct LargestOf;
template <>
struct LargestOf<float> {
  __m512i largest;
  TORCHAO8_HD LargestOf() : largest(_mm512_setzero_si512()) {}
  TORCHAO8_HD void add(F v) {
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits(v), all_lanes(0x7fffffff)));
  }
  TORCHAO8_HD void add(const float* x) {  // of 32
    add(load(x));
    add(load(x + kWidth));
  }
  TORCHAO8_HD float result() const { return bits_float(_mm512_reduce_max_epu32(largest)); }
};
template <>
struct LargestOf<BFloat16> {
  __m512i largest;  // of words
  TORCHAO8_HD LargestOf() : largest(_mm512_setzero_si512()) {}
  TORCHAO8_HD void add(const BFloat16* x) {  // of 32
    largest =
        _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(x), all_lanes(0x7fff7fff)));
  }
  TORCHAO8_HD float result() const {
    const __m512i first = _mm512_slli_epi32(largest, 16);
    const __m512i second = _mm512_and_si512(largest, all_lanes(0xffff0000u));
    return bits_float(_mm512_reduce_max_epu32(_mm512_max_epu32(first, second)));
  }
};
struct LargestByte {
  __m256i largest;
  TORCHAO8_HD LargestByte() : largest(_mm256_setzero_si256()) {}
  // Of 32 bytes, the bits of a mask.
  template <uint8_t kMask>
  TORCHAO8_HD void add(const uint8_t* x) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if (kMask != 255) v = _mm256_and_si256(v, _mm256_set1_epi8(char(kMask)));
    largest = _mm256_max_epu8(largest, v);
  }
  TORCHAO8_HD uint32_t result() const {
    __m128i x = _mm_max_epu8(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    // The least of the complements, as words of one byte each.
    x = _mm_xor_si128(x, _mm_set1_epi32(-1));
    x = _mm_min_epu8(x, _mm_srli_epi16(x, 8));
    return 255 - (uint32_t(_mm_cvtsi128_si32(_mm_minpos_epu16(x))) & 255);
  }
};

}  // namespace torchao8::avx512
