// quantize_blockwise and dequantize_blockwise: a warp takes a block, a lane every 32nd element.
#pragma once

#include "cuda/block.cuh"
#include "cuda/codec.cuh"
#include "cuda/floats.cuh"

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

// As cpu/formats/dynamic/codec.inl: quantize_block(). A negative number of an unsigned state counts
// as zero.
template <bool kSigned>
__device__ __forceinline__ void quantize_block(const QuantizeArguments& a, const Tables& tables,
                                               uint32_t block, int lane) {
  const BlockPosition position(a.row_length, a.blocks_per_row, a.block_size, block, 0,
                               a.row_length);
  const auto value = [&](int i) {
    const float x = load_as(a.type, a.input, position.begin + i);
    return !kSigned && x <= 0.0f && x >= -3.4028235e38f ? 0.0f : x;
  };
  Extreme<kSigned> of_lane;
  for (int i = lane; i < position.length; i += kLanes) of_lane.add(value(i));
  const float extreme = of_lane.result(kLanes);
  const bool finite = (float_bits(extreme) & 0x7fffffffu) < 0x7f800000u;
  // From 2^126 on the inverse would be subnormal.
  const float factor = !usable<kSigned>(extreme) && finite ? 0.25f : 1.0f;
  const float inverse = inverse_of<kSigned>(extreme * factor);
  for (int i = lane; i < position.length; i += kLanes) {
    const float x = value(i);
    uint32_t code = zero_code<kSigned>();
    if (inverse != 0.0f) {
      code = encode_nearest<kSigned>(tables, x * factor, inverse);
      if (!kSigned && x > 0.0f && code == 0) code = 1;
    }
    a.codes[position.begin + i] = uint8_t(code);
  }
  if (lane == 0) {
    a.scales[block] = inverse != 0.0f ? extreme : finite ? 0.0f : bits_float(0x7fc00000u);
  }
}

template <bool kSigned>
__global__ void __launch_bounds__(kThreads)
    quantize(const QuantizeArguments a, const Tables* source) {
  TORCHAO8_SHARED(Tables, tables);
  copy_tables(tables, *source);
  __syncthreads();
  const int lane = int(threadIdx.x % kLanes);
  for (uint64_t block = uint64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; block < a.blocks;
       block += uint64_t(gridDim.x) * kWarps)
    quantize_block<kSigned>(a, tables, uint32_t(block), lane);
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

template <bool kSigned>
__global__ void __launch_bounds__(kThreads)
    dequantize(const DequantizeArguments a, const Tables* source) {
  TORCHAO8_SHARED(Tables, tables);
  copy_tables(tables, *source);
  __syncthreads();
  const int lane = int(threadIdx.x % kLanes);
  for (uint64_t block = uint64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; block < a.blocks;
       block += uint64_t(gridDim.x) * kWarps) {
    const BlockPosition position(a.row_length, a.blocks_per_row, a.block_size, uint32_t(block), 0,
                                 a.row_length);
    const Real scale(a.scales[block]);
    for (int i = lane; i < position.length; i += kLanes) {
      const Real x(decode<kSigned>(tables, a.codes[position.begin + i]));
      store_as(a.type, a.output, position.begin + i, (x * scale).x);
    }
  }
}

}  // namespace torchao8::cuda
