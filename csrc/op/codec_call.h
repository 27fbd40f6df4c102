// What the codec's ops check and make on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "codec/block_layout.h"
#include "op/checks.h"
#include "op/format_check.h"

namespace torchao8 {

inline Tensor new_contiguous(const Tensor& like, const std::vector<int64_t>& shape,
                             ScalarType dtype) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

// The sizes of what codes stand for. Codes of 4 bits do not tell whether the last half of a row's
// last byte is empty: it counts as an element.
inline std::vector<int64_t> sizes_of_codes(const char* op, const Tensor& codes, int bits) {
  const auto sizes = codes.sizes();
  std::vector<int64_t> elements(sizes.begin(), sizes.end());
  if (bits == 8) return elements;
  TORCHAO8_CHECK(!elements.empty(), op, ": codes of 4 bits must have the shape of rows, got []");
  elements.back() *= 2;
  return elements;
}

// The arguments of dequantize_blockwise; returns where the blocks lie. elements: as above.
inline BlockLayout check_dequantize(const char* op, const Tensor& codes, const Tensor& scale,
                                    const std::vector<int64_t>& elements, int64_t block_size,
                                    ScalarType dtype, const Device& device) {
  check_device({op, "codes"}, codes, device);
  check_device({op, "scale"}, scale, device);
  check_dtype({op, "codes"}, codes, ScalarType::Byte);
  check_dtype({op, "scale"}, scale, ScalarType::Float);
  check_block_size(op, block_size);
  check_contiguous({op, "codes"}, codes);
  check_contiguous({op, "scale"}, scale);
  const BlockLayout layout = block_layout(elements, block_size);
  check_shape({op, "scale"}, scale, layout.scale_shape(elements),
              "one scale per block of a row of codes");
  TORCHAO8_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
      ": dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  return layout;
}

}  // namespace torchao8
