// Sixteen floats in two AVX registers (AVX2, FMA, F16C: Haswell and later, Zen and later). Included
// inside a region compiled for that target: see isa_avx2.cpp. The bits are those of scalar.h.
//
// Two, so that every instruction has an independent twin beside it, and codes are packed and stored
// sixteen at a time.
#pragma once

namespace torchao8::avx2 {

constexpr int kWidth = 16;

struct F {
  __m256 low, high;
  TORCHAO8_HD F() {}
  TORCHAO8_HD F(__m256 l, __m256 h) : low(l), high(h) {}
  TORCHAO8_HD explicit F(float v) : low(_mm256_set1_ps(v)), high(low) {}
};
struct I {
  __m256i low, high;
};

TORCHAO8_HD F operator*(F a, F b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
TORCHAO8_HD F operator+(F a, F b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
TORCHAO8_HD F operator-(F a, F b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
TORCHAO8_HD F operator&(F a, F b) {
  return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)};
}
TORCHAO8_HD F operator|(F a, F b) {
  return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)};
}
TORCHAO8_HD F operator^(F a, F b) {
  return {_mm256_xor_ps(a.low, b.low), _mm256_xor_ps(a.high, b.high)};
}
TORCHAO8_HD F fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TORCHAO8_HD F sqrt(F a) {
  return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)};
}
TORCHAO8_HD F reciprocal(F a) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_div_ps(one, a.low), _mm256_div_ps(one, a.high)};
}
// Where one is NaN, the second.
TORCHAO8_HD F max(F a, F b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
TORCHAO8_HD F min(F a, F b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
template <int kPredicate>
TORCHAO8_HD F compare(F a, F b) {
  return {_mm256_cmp_ps(a.low, b.low, kPredicate), _mm256_cmp_ps(a.high, b.high, kPredicate)};
}
TORCHAO8_HD F magnitude(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
TORCHAO8_HD F sign(F a) {
  return compare<_CMP_NEQ_OQ>(a, F(0.0f)) & ((a & F(-0.0f)) | F(1.0f));
}

// Integers, in dwords.

// One number in all lanes. As a float it is broadcast from memory by a load; as an integer GCC
// would move it through a general register and a permutation port.
TORCHAO8_HD I all_lanes(uint32_t x) {
  const __m256i v = _mm256_castps_si256(_mm256_set1_ps(bits_float(x)));
  return {v, v};
}
TORCHAO8_HD I bits(F a) {
  return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)};
}
TORCHAO8_HD F from_bits(I a) {
  return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)};
}
TORCHAO8_HD I operator+(I a, I b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
TORCHAO8_HD I operator-(I a, I b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
TORCHAO8_HD I operator&(I a, I b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
TORCHAO8_HD I operator|(I a, I b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
TORCHAO8_HD I operator^(I a, I b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
TORCHAO8_HD I operator<<(I a, int n) {
  return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)};
}
TORCHAO8_HD I operator>>(I a, int n) {  // of unsigned numbers
  return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)};
}
// By 0 to 31; by more, everything is shifted out.
TORCHAO8_HD I operator<<(I a, I n) {
  return {_mm256_sllv_epi32(a.low, n.low), _mm256_sllv_epi32(a.high, n.high)};
}
TORCHAO8_HD I operator>>(I a, I n) {
  return {_mm256_srlv_epi32(a.low, n.low), _mm256_srlv_epi32(a.high, n.high)};
}
TORCHAO8_HD I with_sign(I a, I b) {  // a times 1, 0 or -1, as b is
  return {_mm256_sign_epi32(a.low, b.low), _mm256_sign_epi32(a.high, b.high)};
}
TORCHAO8_HD I equal(I a, I b) {
  return {_mm256_cmpeq_epi32(a.low, b.low), _mm256_cmpeq_epi32(a.high, b.high)};
}
TORCHAO8_HD I min(I a, I b) {  // of unsigned numbers
  return {_mm256_min_epu32(a.low, b.low), _mm256_min_epu32(a.high, b.high)};
}
TORCHAO8_HD I max(I a, I b) {
  return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)};
}
TORCHAO8_HD I truncate(F a) {
  return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)};
}

// A look-up in 8 floats by the low three bits of an index, and in 16 bytes, twice the same 16, by
// the low four bits of each byte of one.
struct Table8 {
  __m256 values;
  TORCHAO8_HD explicit Table8(const float* x) : values(_mm256_loadu_ps(x)) {}
  TORCHAO8_HD F operator()(I i) const {
    __m256 v = values;
#if defined(__GNUC__) && !defined(__clang__)
    // In a register: with the table in memory, which GCC prefers, the instruction takes twice as
    // long on Zen 3.
    asm("" : "+x"(v));
#endif
    const __m256i w = _mm256_castps_si256(v);
    return from_bits(
        {_mm256_permutevar8x32_epi32(w, i.low), _mm256_permutevar8x32_epi32(w, i.high)});
  }
};
struct Table16 {
  __m256i values;
  TORCHAO8_HD explicit Table16(const uint8_t* x)
      : values(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))) {}
  TORCHAO8_HD I operator()(I i) const {
    return {_mm256_shuffle_epi8(values, i.low), _mm256_shuffle_epi8(values, i.high)};
  }
};

// Four doubles, for sums.
constexpr int kDoubles = 4;
struct Doubles {
  __m256d x;
  TORCHAO8_HD Doubles() {}
  TORCHAO8_HD Doubles(__m256d v) : x(v) {}
  TORCHAO8_HD explicit Doubles(double v) : x(_mm256_set1_pd(v)) {}
};
TORCHAO8_HD Doubles operator+(Doubles a, Doubles b) {
  return _mm256_add_pd(a.x, b.x);
}
TORCHAO8_HD Doubles operator-(Doubles a, Doubles b) {
  return _mm256_sub_pd(a.x, b.x);
}
TORCHAO8_HD Doubles fma(Doubles a, Doubles b, Doubles c) {
  return _mm256_fmadd_pd(a.x, b.x, c.x);
}
TORCHAO8_HD Doubles load_doubles(const float* x) {
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
}
TORCHAO8_HD void store_doubles(double* x, Doubles v) {
  _mm256_store_pd(x, v.x);
}

TORCHAO8_HD I load_integers(const void* x) {
  const __m256i* p = static_cast<const __m256i*>(x);
  return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
}
// The low halves of dwords, which are below 2^16.
TORCHAO8_HD __m256i pack_words(I x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xd8);
}
// The low bytes of dwords, which are at most 255; what is negative becomes 0.
TORCHAO8_HD void store_bytes(uint8_t* to, I x) {
  __m256i packed = _mm256_packs_epi32(x.low, x.high);
  packed = _mm256_packus_epi16(packed, packed);
  packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

TORCHAO8_HD F load(const float* x) {
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
TORCHAO8_HD void store(float* x, F v) {
  _mm256_storeu_ps(x, v.low);
  _mm256_storeu_ps(x + 8, v.high);
}
TORCHAO8_HD F load(const BFloat16* x) {
  const __m128i* p = reinterpret_cast<const __m128i*>(x);
  const I words = {_mm256_cvtepu16_epi32(_mm_loadu_si128(p)),
                   _mm256_cvtepu16_epi32(_mm_loadu_si128(p + 1))};
  return from_bits(words << 16);
}
TORCHAO8_HD I round_to_bfloat16(I u) {  // in the high halves
  return u + all_lanes(0x7fff) + (u >> 16 & all_lanes(1));
}
TORCHAO8_HD void store_high_halves(BFloat16* x, I r) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), pack_words(r >> 16));
}
TORCHAO8_HD I or_quiet(F v, I rounded) {  // NaN stays NaN
  const F nan = compare<_CMP_UNORD_Q>(v, v);
  const I quiet = bits(v) | all_lanes(0x400000);
  return {_mm256_blendv_epi8(rounded.low, quiet.low, _mm256_castps_si256(nan.low)),
          _mm256_blendv_epi8(rounded.high, quiet.high, _mm256_castps_si256(nan.high))};
}
TORCHAO8_HD void store(BFloat16* x, F v) {
  store_high_halves(x, or_quiet(v, round_to_bfloat16(bits(v))));
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
using Hashes = I;
TORCHAO8_HD Hashes load_hashes(const uint32_t* x) {
  return load_integers(x);
}
TORCHAO8_HD I round_to_bfloat16(I u, Hashes h) {  // in the high halves
  return u + (h >> 16);
}
TORCHAO8_HD void store(BFloat16* x, F v, Hashes h) {
  store_high_halves(x, or_quiet(v, round_to_bfloat16(bits(v), h)));
}
TORCHAO8_HD void store_quiet(BFloat16* x, F v, Hashes h) {
  store_high_halves(x, round_to_bfloat16(bits(v), h));
}
TORCHAO8_HD F load(const Half* x) {
  const __m128i* p = reinterpret_cast<const __m128i*>(x);
  return {_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1))};
}
TORCHAO8_HD void store(Half* x, F v) {
  __m128i* p = reinterpret_cast<__m128i*>(x);
  _mm_storeu_si128(p, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(p + 1, _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}

using Mask = F;
template <bool kSigned>
TORCHAO8_HD Mask in_range(F v) {
  I u = kSigned ? bits(magnitude(v)) : min(bits(v), all_lanes(0x7fffffff));  // compared as signed
  const __m256i end = _mm256_set1_epi32(0x7e800000);
  return from_bits({_mm256_cmpgt_epi32(end, u.low), _mm256_cmpgt_epi32(end, u.high)});
}
TORCHAO8_HD Mask both(Mask a, Mask b) {
  return a & b;
}
TORCHAO8_HD bool any(I a) {  // of masks
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(a.low, a.high))) != 0;
}
TORCHAO8_HD bool all(Mask a) {
  return _mm256_movemask_ps(_mm256_and_ps(a.low, a.high)) == 0xff;
}
TORCHAO8_HD I select(I m, I yes, I no) {
  return {_mm256_blendv_epi8(no.low, yes.low, m.low),
          _mm256_blendv_epi8(no.high, yes.high, m.high)};
}
TORCHAO8_HD F select(Mask m, F yes, F no) {
  return {_mm256_blendv_ps(no.low, yes.low, m.low), _mm256_blendv_ps(no.high, yes.high, m.high)};
}

TORCHAO8_HD float reduce_max(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Signed: NaN is not seen here, but in the unsigned moment, which has one wherever a gradient has.
template <bool kSigned>
struct Extreme;
template <>
struct Extreme<true> {
  F high, low;
  TORCHAO8_HD Extreme() : high(0.0f), low(0.0f) {}
  TORCHAO8_HD void add(F v) {
    high = max(v, high);
    low = min(v, low);
  }
  TORCHAO8_HD float result() const {
    const float h = reduce_max(_mm256_max_ps(high.low, high.high));
    const __m256 negated = _mm256_xor_ps(_mm256_min_ps(low.low, low.high), _mm256_set1_ps(-0.0f));
    const float l = reduce_max(negated);
    return l > h ? -l : h;
  }
};
template <>
struct Extreme<false> {
  I high;
  TORCHAO8_HD Extreme() : high(all_lanes(0)) {}
  TORCHAO8_HD void add(F v) { high = max(high, bits(v)); }
  TORCHAO8_HD float result() const {
    const __m256i h = _mm256_max_epu32(high.low, high.high);
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
    return bits_float(uint32_t(_mm_cvtsi128_si32(x)));
  }
};

// The hashes of 16 neighbouring elements, two times 8, the first one's number being a multiple
// of 8.
struct RandomStream {
  I h;
  __m256i difference;
  TORCHAO8_HD void start(BlockRandom r, uint32_t first = 0) {
    r = r.from(first / 8);
    const __m256i t = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneFactors.t));
    const auto line = [&](uint32_t a, uint32_t b) TORCHAO8_LAMBDA {
      return _mm256_add_epi32(_mm256_set1_epi32(int(a)),
                              _mm256_mullo_epi32(_mm256_set1_epi32(int(b)), t));
    };
    const __m256i step = line(r.c2, r.c3);
    h.low = line(r.c0, r.c1);
    h.high = _mm256_add_epi32(h.low, step);
    difference = _mm256_slli_epi32(step, 1);
  }
  TORCHAO8_HD Hashes next_hashes() {
    const I now = h;
    h = h + I{difference, difference};
    return now;
  }
  TORCHAO8_HD F next() {
    return from_bits((next_hashes() & all_lanes(kRandomMask)) | all_lanes(kOneBits));
  }
};

// ---- bytes, two vectors of numbers at a time
// -----------------------------------------------------

using U = I;  // of unsigned numbers
TORCHAO8_HD U lanes_of(uint32_t x) {
  return all_lanes(x);
}
TORCHAO8_HD U lanes_of(Hashes hashes) {
  return hashes;
}
TORCHAO8_HD U bits_of(F a) {
  return bits(a);
}
TORCHAO8_HD F float_of(U a) {
  return from_bits(a);
}
TORCHAO8_HD U load_bytes(const uint8_t* x) {
  const __m128i* p = reinterpret_cast<const __m128i*>(x);
  const __m128i* q = reinterpret_cast<const __m128i*>(x + 8);
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64(q))};
}
TORCHAO8_HD U load_signed_bytes(const uint8_t* x) {
  const __m128i* p = reinterpret_cast<const __m128i*>(x);
  const __m128i* q = reinterpret_cast<const __m128i*>(x + 8);
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64(q))};
}

// 32 bytes, in the order in which packing leaves them.
struct Bytes {
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
// Numbers from `less` to 2^15, less that, but at most kMost: 127 or 255.
template <int kMost>
TORCHAO8_HD Bytes pack_less(U a, U b, uint32_t less) {
  const __m256i all = _mm256_set1_epi16(short(less));
  const __m256i low = _mm256_sub_epi16(_mm256_packus_epi32(a.low, a.high), all);
  const __m256i high = _mm256_sub_epi16(_mm256_packus_epi32(b.low, b.high), all);
  return {kMost == 127 ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high)};
}
// The signs, in the highest bits.
TORCHAO8_HD Bytes sign_bytes(F a, F b) {
  const U u = bits(a), v = bits(b);
  const __m256i signs =
      _mm256_packs_epi16(_mm256_packs_epi32(u.low, u.high), _mm256_packs_epi32(v.low, v.high));
  return {_mm256_and_si256(signs, _mm256_set1_epi8(char(0x80)))};
}
TORCHAO8_HD void store_bytes(uint8_t* to, Bytes bytes) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes.x, order));
}

// The largest magnitude of many numbers; NaN is above all.
TORCHAO8_HD uint32_t reduce_max_bits(__m256i v) {
  __m128i x = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(x));
}
template <class T>
struct LargestOf;
template <>
struct LargestOf<float> {
  I largest;
  TORCHAO8_HD LargestOf() : largest(all_lanes(0)) {}
  TORCHAO8_HD void add(F v) { largest = max(largest, bits(v) & all_lanes(0x7fffffff)); }
  TORCHAO8_HD void add(const float* x) {  // of 32
    add(load(x));
    add(load(x + kWidth));
  }
  TORCHAO8_HD float result() const {
    return bits_float(reduce_max_bits(_mm256_max_epu32(largest.low, largest.high)));
  }
};
template <>
struct LargestOf<BFloat16> {
  I largest;  // of words
  TORCHAO8_HD LargestOf() : largest(all_lanes(0)) {}
  TORCHAO8_HD void add(const BFloat16* x) {  // of 32
    const I v = load_integers(x) & all_lanes(0x7fff7fff);
    largest.low = _mm256_max_epu16(largest.low, v.low);
    largest.high = _mm256_max_epu16(largest.high, v.high);
  }
  TORCHAO8_HD float result() const {
    const __m256i v = _mm256_max_epu16(largest.low, largest.high);
    const __m256i first = _mm256_slli_epi32(v, 16);
    const __m256i second = _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000u)));
    return bits_float(reduce_max_bits(_mm256_max_epu32(first, second)));
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

}  // namespace torchao8::avx2
