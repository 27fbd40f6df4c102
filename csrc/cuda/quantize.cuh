// quantize_blockwise and dequantize_blockwise: a warp takes a block, a lane every 32nd element.
#pragma once

#include "cuda/floats.cuh"
#include "cuda/formats/dynamic.cuh"
#include "cuda/formats/four_bit.cuh"
#include "cuda/formats/mulaw.cuh"

namespace torchao8::cuda {

struct QuantizeArguments {
  const void* input;
  uint8_t* codes;
  float* scales;
  int64_t row_length;
  uint32_t blocks_per_row, blocks;
  int32_t block_size;
  FloatType type;
};

// A block of numbers; a negative one of an unsigned state counts as zero.
template <bool kSigned>
struct BlockInput {
  const QuantizeArguments& a;
  BlockPosition position;

  uint32_t row;

  TORCHAO8_HD BlockInput(const QuantizeArguments& arguments, uint32_t block)
      : a(arguments),
        position(a.row_length, a.blocks_per_row, a.block_size, block, 0, a.row_length),
        row(block / a.blocks_per_row) {}

  TORCHAO8_HD float operator()(int i) const {
    const float x = load_as(a.type, a.input, position.begin + i);
    return !kSigned && x <= 0.0f && x >= -3.4028235e38f ? 0.0f : x;
  }
  TORCHAO8_HD void write(int i, uint32_t code) const {
    a.codes[position.begin + i] = uint8_t(code);
  }
  // Codes of 4 bits, of elements 2 i and 2 i + 1.
  TORCHAO8_HD void write_two(int i, uint32_t codes) const {
    const int64_t column = position.begin - row * a.row_length;
    a.codes[row * ((a.row_length + 1) / 2) + column / 2 + i] = uint8_t(codes);
  }
};

// As cpu/formats/dynamic/codec.inl: quantize_block().
template <bool kSigned>
__device__ __forceinline__ float quantize_block(const BlockInput<kSigned>& x,
                                                const dynamic::Tables& tables, int lane) {
  const int length = x.position.length;
  Extreme<kSigned> of_lane;
  for (int i = lane; i < length; i += kLanes) of_lane.add(x(i));
  const float extreme = of_lane.result(kLanes);
  const bool finite = (float_bits(extreme) & 0x7fffffffu) < 0x7f800000u;
  // From 2^126 on the inverse would be subnormal.
  const float factor = !usable<kSigned>(extreme) && finite ? 0.25f : 1.0f;
  const float inverse = inverse_of<kSigned>(extreme * factor);
  for (int i = lane; i < length; i += kLanes) {
    uint32_t code = zero_code<kSigned>();
    if (inverse != 0.0f) {
      code = dynamic::encode_nearest<kSigned>(tables, x(i) * factor, inverse);
      if (!kSigned && x(i) > 0.0f && code == 0) code = 1;
    }
    x.write(i, code);
  }
  return inverse != 0.0f ? extreme : finite ? 0.0f : bits_float(0x7fc00000u);
}

// As cpu/formats/mulaw/scalar.inl: quantize_block(), by mulaw_scale_of_block().
template <bool kSigned>
__device__ __forceinline__ float quantize_block(const BlockInput<kSigned>& x,
                                                const TablesOf<MulawFormat>&, int lane) {
  const int length = x.position.length;
  float largest = 0.0f;
  for (int i = lane; i < length; i += kLanes) largest = larger_magnitude(largest, x(i));
  largest = bits_float(largest_of_lanes(float_bits(largest), kLanes));
  const MulawScale to = mulaw_scale_of_largest<kSigned>(largest);
  for (int i = lane; i < length; i += kLanes) {
    using Code = MulawFormat::Codec<kSigned>;
    x.write(i,
            std::isnan(to.scale) ? 0 : Code::encode(x(i), to.inverse, Code::kHalf, to.least_code));
  }
  return to.scale;
}

// As cpu/formats/four_bit/scalar.inl: quantize_block(), by four_bit_scale_of_block().
template <bool kSigned>
__device__ __forceinline__ float quantize_block(const BlockInput<kSigned>& x,
                                                const TablesOf<FourBitFormat>&, int lane) {
  const int length = x.position.length;
  Extreme<kSigned> of_lane;
  for (int i = lane; i < length; i += kLanes) of_lane.add(x(i));
  const float highest = kSigned ? of_lane.highest(kLanes) : of_lane.result(kLanes);
  const float lowest = kSigned ? of_lane.lowest(kLanes) : 0.0f;
  const FourBitScale to = four_bit_scale_of_ends<kSigned>(
      std::isfinite(highest) && std::isfinite(lowest) ? highest : bits_float(0x7fc00000u), lowest);
  const auto code = [&](int i) -> uint32_t {
    if (i >= length || std::isnan(to.scale)) return FourBitFormat::zero_byte<kSigned>() & 15;
    if constexpr (kSigned) return FourBitLevels::encode(x(i), to.inverse);
    return FourBitSquares::encode(x(i), to.inverse, FourBitSquares::kHalf);
  };
  for (int i = lane; 2 * i < length; i += kLanes)
    x.write_two(i, code(2 * i) | code(2 * i + 1) << 4);
  return to.scale;
}

template <bool kSigned, class Format>
__global__ void __launch_bounds__(kThreads)
    quantize(const QuantizeArguments a, const TablesOf<Format>* source) {
  TORCHAO8_SHARED(TablesOf<Format>, tables);
  CodecOf<Format>::copy_tables(tables, *source);
  __syncthreads();
  const int lane = int(threadIdx.x % kLanes);
  for (uint64_t block = uint64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; block < a.blocks;
       block += uint64_t(gridDim.x) * kWarps) {
    const float scale = quantize_block(BlockInput<kSigned>(a, uint32_t(block)), tables, lane);
    if (lane == 0) a.scales[block] = scale;
  }
}

struct DequantizeArguments {
  const uint8_t* codes;
  const float* scales;
  void* output;
  int64_t row_length;
  uint32_t blocks_per_row, blocks;
  int32_t block_size;
  FloatType type;
};

template <bool kSigned, class Format>
__global__ void __launch_bounds__(kThreads)
    dequantize(const DequantizeArguments a, const TablesOf<Format>* source) {
  TORCHAO8_SHARED(TablesOf<Format>, tables);
  CodecOf<Format>::copy_tables(tables, *source);
  __syncthreads();
  const int lane = int(threadIdx.x % kLanes);
  for (uint64_t block = uint64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; block < a.blocks;
       block += uint64_t(gridDim.x) * kWarps) {
    const BlockPosition position(a.row_length, a.blocks_per_row, a.block_size, uint32_t(block), 0,
                                 a.row_length);
    const Real scale(a.scales[block]);
    for (int i = lane; i < position.length; i += kLanes) {
      const int64_t at = position.begin + i;
      uint32_t code;
      if constexpr (Format::kBits == 8) {
        code = a.codes[at];
      } else {
        code = four_bit_code(a.codes, at);  // rows of whole bytes
      }
      store_as(a.type, a.output, at,
               (Real(CodecOf<Format>::template decode<kSigned>(tables, code)) * scale).x);
    }
  }
}

}  // namespace torchao8::cuda
