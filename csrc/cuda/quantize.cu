// The ops quantize_blockwise and dequantize_blockwise on CUDA.
#include "cuda/quantize.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "codec/block_layout.h"
#include "cuda/device_codec.h"
#include "cuda/launch.h"
#include "op/codec_call.h"

namespace torchao8::cuda {
namespace {

uint32_t count_blocks(const char* op, const BlockLayout& layout) {
  const int64_t blocks = layout.rows * layout.blocks_per_row;
  TORCHAO8_CHECK(blocks < int64_t(1) << 32, op, ": more than 2^32 blocks");
  return uint32_t(blocks);
}

std::tuple<Tensor, Tensor> quantize_blockwise_cuda(Tensor input, int64_t block_size, bool is_signed,
                                                   int64_t state_format) {
  const char* op = "quantize_blockwise";
  const FloatType type = check_float_type({op, "input"}, input);
  check_block_size(op, block_size);
  check_state_format(op, state_format, Formats());
  const auto sizes = input.sizes();
  const BlockLayout layout = block_layout(sizes, block_size);
  const Launcher launcher(op, input.get_device_index());
  const Tensor dense = input.is_contiguous() ? input : torch::stable::contiguous(input);
  Tensor codes = new_contiguous(input, {sizes.begin(), sizes.end()}, ScalarType::Byte);
  Tensor scale = new_contiguous(input, layout.scale_shape(sizes), ScalarType::Float);
  const QuantizeArguments arguments = {dense.const_data_ptr(),
                                       codes.mutable_data_ptr<uint8_t>(),
                                       scale.mutable_data_ptr<float>(),
                                       layout.row_length,
                                       uint32_t(layout.blocks_per_row),
                                       count_blocks(op, layout),
                                       int32_t(block_size),
                                       type};
  visit_format(Formats(), state_format, [&](auto type) {
    using Format = typename decltype(type)::type;
    launcher.launch_over(arguments.blocks,
                         is_signed ? quantize<true, Format> : quantize<false, Format>,
                         sizeof(TablesOf<Format>), arguments, tables_on<Format>(launcher));
  });
  return {codes, scale};
}

Tensor dequantize_blockwise_cuda(Tensor codes, Tensor scale, int64_t block_size, bool is_signed,
                                 ScalarType dtype, int64_t state_format) {
  const char* op = "dequantize_blockwise";
  check_state_format(op, state_format, Formats());
  const Device device = device_of({op, "codes"}, codes);
  const std::vector<int64_t> sizes = sizes_of_codes(op, codes, format_info(state_format).bits);
  const BlockLayout layout = check_dequantize(op, codes, scale, sizes, block_size, dtype, device);
  Tensor result = new_contiguous(codes, sizes, dtype);
  const Launcher launcher(op, device.index);
  const DequantizeArguments arguments = {codes.const_data_ptr<uint8_t>(),
                                         scale.const_data_ptr<float>(),
                                         result.mutable_data_ptr(),
                                         layout.row_length,
                                         uint32_t(layout.blocks_per_row),
                                         count_blocks(op, layout),
                                         int32_t(block_size),
                                         check_float_type({op, "result"}, result)};
  visit_format(Formats(), state_format, [&](auto type) {
    using Format = typename decltype(type)::type;
    launcher.launch_over(arguments.blocks,
                         is_signed ? dequantize<true, Format> : dequantize<false, Format>,
                         sizeof(TablesOf<Format>), arguments, tables_on<Format>(launcher));
  });
  return result;
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("quantize_blockwise", TORCH_BOX(&torchao8::cuda::quantize_blockwise_cuda));
  m.impl("dequantize_blockwise", TORCH_BOX(&torchao8::cuda::dequantize_blockwise_cuda));
}
