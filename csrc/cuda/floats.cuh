// Parameters and gradients of any float type, one by one and eight at a time.
#pragma once

#include <type_traits>

#include "codec/floats.h"
#include "cuda/device.cuh"

namespace torchao8::cuda {

TORCHAO8_HD float load_as(FloatType type, const void* from, int64_t i) {
  switch (type) {
    case FloatType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(from)[i]);
    case FloatType::kFloat16:
      return to_float(static_cast<const Half*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}
TORCHAO8_HD void store_as(FloatType type, void* to, int64_t i, float x) {
  switch (type) {
    case FloatType::kBFloat16:
      static_cast<BFloat16*>(to)[i] = to_bfloat16(x);
      break;
    case FloatType::kFloat16:
      static_cast<Half*>(to)[i] = to_half(x);
      break;
    default:
      static_cast<float*>(to)[i] = x;
  }
}
// The same; a bfloat16 is rounded stochastically.
TORCHAO8_HD void store_as(FloatType type, void* to, int64_t i, float x, uint32_t hash) {
  if (type == FloatType::kBFloat16) {
    static_cast<BFloat16*>(to)[i] = to_bfloat16(x, hash);
  } else {
    store_as(type, to, i, x);
  }
}

// Neighbouring elements, aligned, that are loaded and stored in words of 16 or 8 bytes.
template <class T, int kCount>
struct Several {
  static constexpr int kBytes = kCount * int(sizeof(T));
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, uint2>;
  static constexpr int kWords = kBytes / int(sizeof(Word)), kInts = int(sizeof(Word)) / 4;
  Word words[kWords];

  TORCHAO8_HD void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; i++) words[i] = reinterpret_cast<const Word*>(from)[i];
  }
  TORCHAO8_HD void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; i++) reinterpret_cast<Word*>(to)[i] = words[i];
  }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return bits_float(part(i));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return bits_float(i % 2 ? part(i / 2) & 0xffff0000u : part(i / 2) << 16);
    } else {
      return widen_half(uint16_t(part(i / 2) >> 16 * (i % 2)));
    }
  }
  __device__ __forceinline__ void set_pair(int pair, float low, float high) {
    if constexpr (sizeof(T) == 4) {
      part(2 * pair) = float_bits(low);
      part(2 * pair + 1) = float_bits(high);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      part(pair) = round_to_bfloat16s(low, high);
    } else {
      part(pair) = round_to_halves(low, high);
    }
  }
  // Rounded stochastically. A GPU's own NaN has low bits: only NaN that came from memory has none.
  TORCHAO8_HD void set_pair(int pair, float low, float high, const uint32_t* hashes) {
    static_assert(std::is_same_v<T, BFloat16>);
    part(pair) = to_bfloat16(low, hashes[0]).bits | uint32_t(to_bfloat16(high, hashes[1]).bits)
                                                        << 16;
  }

 private:
  TORCHAO8_HD uint32_t part(int i) const { return const_cast<Several*>(this)->part(i); }
  TORCHAO8_HD uint32_t& part(int i) {
    Word& word = words[i / kInts];
    if constexpr (kInts == 4) {
      return i % 4 == 0 ? word.x : i % 4 == 1 ? word.y : i % 4 == 2 ? word.z : word.w;
    } else {
      return i % 2 == 0 ? word.x : word.y;
    }
  }
};

}  // namespace torchao8::cuda
