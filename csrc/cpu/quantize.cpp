// The ops quantize_blockwise and dequantize_blockwise on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "codec/block_layout.h"
#include "cpu/engine.h"
#include "cpu/memory.h"
#include "op/codec_call.h"

namespace torchao8 {
namespace {

constexpr int64_t kGrainBlocks = 64;

// Calls f(block, begin, bytes, length) for every block, shared among torch's threads: its first
// element, and where its codes begin.
template <class Function>
void for_each_block(const BlockLayout& layout, int64_t block_size, const FormatInfo& format,
                    const Function& f) {
  const int64_t row_bytes = format.bytes(layout.row_length);
  torch::stable::parallel_for(
      0, layout.rows * layout.blocks_per_row, kGrainBlocks, [&](int64_t first, int64_t last) {
        const DefaultFloatingPoint guard;
        for (int64_t block = first; block < last; block++) {
          const int64_t column = block % layout.blocks_per_row * block_size;
          const int64_t row = block / layout.blocks_per_row;
          f(block, row * layout.row_length + column, row * row_bytes + format.bytes(column),
            int(std::min(block_size, layout.row_length - column)));
        }
      });
}

std::tuple<Tensor, Tensor> quantize_blockwise_cpu(Tensor input, int64_t block_size, bool is_signed,
                                                  int64_t state_format) {
  const char* op = "quantize_blockwise";
  check_device({op, "input"}, input, kCpu);
  const FloatType type = check_float_type({op, "input"}, input);
  check_block_size(op, block_size);
  check_state_format(op, state_format, Formats());
  const auto sizes = input.sizes();
  const BlockLayout layout = block_layout(sizes, block_size);
  const FormatInfo& format = format_info(state_format);
  Tensor codes = new_contiguous(input, layout.codes_shape(sizes, format.bits), ScalarType::Byte);
  Tensor scale = new_contiguous(input, layout.scale_shape(sizes), ScalarType::Float);
  const FloatArray values(input, type, input.const_data_ptr());
  const ConvertKernels& convert = convert_kernels();
  const CodecKernels& codec = format_kernels(state_format).codec;
  uint8_t* code = codes.mutable_data_ptr<uint8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  for_each_block(layout, block_size, format,
                 [&](int64_t block, int64_t begin, int64_t bytes, int length) {
                   alignas(64) float buffer[kMaxBlock];
                   values.read(convert, begin, length, buffer);
                   if (!is_signed) {  // a negative number counts as zero
                     for (int i = 0; i < length; i++) {
                       if (buffer[i] <= 0.0f && std::isfinite(buffer[i])) buffer[i] = 0.0f;
                     }
                   }
                   scales[block] = codec.quantize[is_signed](buffer, length, code + bytes);
                 });
  return {codes, scale};
}

Tensor dequantize_blockwise_cpu(Tensor codes, Tensor scale, int64_t block_size, bool is_signed,
                                ScalarType dtype, int64_t state_format) {
  const char* op = "dequantize_blockwise";
  check_state_format(op, state_format, Formats());
  const FormatInfo& format = format_info(state_format);
  const std::vector<int64_t> sizes = sizes_of_codes(op, codes, format.bits);
  const BlockLayout layout = check_dequantize(op, codes, scale, sizes, block_size, dtype, kCpu);
  Tensor result = new_contiguous(codes, sizes, dtype);
  const FloatArray values(result, check_float_type({op, "result"}, result),
                          result.mutable_data_ptr());
  const ConvertKernels& convert = convert_kernels();
  const CodecKernels& codec = format_kernels(state_format).codec;
  const uint8_t* code = codes.const_data_ptr<uint8_t>();
  const float* scales = scale.const_data_ptr<float>();
  for_each_block(layout, block_size, format,
                 [&](int64_t block, int64_t begin, int64_t bytes, int length) {
                   alignas(64) float buffer[kMaxBlock];
                   codec.dequantize[is_signed](code + bytes, length, scales[block], buffer);
                   values.write(convert, buffer, begin, length);
                 });
  return result;
}

int64_t cpu_capability_number() {
  return int64_t(cpu_capability());
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("quantize_blockwise", TORCH_BOX(&torchao8::quantize_blockwise_cpu));
  m.impl("dequantize_blockwise", TORCH_BOX(&torchao8::dequantize_blockwise_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(torchao8, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&torchao8::cpu_capability_number));
}
