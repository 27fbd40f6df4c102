// Where blocks lie: inside rows, so that sharding a tensor along its leading dimensions falls
// between them. A tensor whose rows would be very short is one row. torchao8/block_layout.py is the
// same rule in Python, with its reasons.
#pragma once

#include <cstdint>
#include <vector>

namespace torchao8 {

// In a shorter row the scales would cost what the codes save.
constexpr int64_t kMinRowLength = 16;

struct BlockLayout {
  int64_t rows = 1;
  int64_t row_length = 1;
  int64_t blocks_per_row = 1;
  int64_t leading_dims = 0;  // those that count the rows

  // The shape of the codes of a tensor of these sizes, of 8 bits or of 4: then two elements share
  // a byte of a row, the first one in its low half. In a row of odd length the last half is empty.
  template <class Shape>
  std::vector<int64_t> codes_shape(const Shape& sizes, int bits) const {
    if (bits == 8) return {sizes.begin(), sizes.end()};
    std::vector<int64_t> shape(sizes.begin(), sizes.begin() + leading_dims);
    shape.push_back((row_length + 1) / 2);
    return shape;
  }
  // The shape of the scales of a tensor of these sizes.
  template <class Shape>
  std::vector<int64_t> scale_shape(const Shape& sizes) const {
    std::vector<int64_t> shape(sizes.begin(), sizes.begin() + leading_dims);
    shape.push_back(blocks_per_row);
    return shape;
  }
  template <class Shape, class ScaleShape>
  bool is_scale_shape(const Shape& sizes, const ScaleShape& shape) const {
    if (int64_t(shape.size()) != leading_dims + 1) return false;
    for (int64_t d = 0; d < leading_dims; d++) {
      if (shape[d] != sizes[d]) return false;
    }
    return shape[leading_dims] == blocks_per_row;
  }
};

// `sizes` is anything with size() and operator[].
template <class Sizes>
BlockLayout block_layout(const Sizes& sizes, int64_t block_size) {
  const int64_t ndim = int64_t(sizes.size());
  const auto elements_from = [&](int64_t k) {
    int64_t product = 1;
    for (int64_t d = k; d < ndim; d++) product *= sizes[d];
    return product;
  };
  // A row is the shortest run of trailing dimensions that holds a block; else all but the first;
  // and if these hold something, but too little, the whole tensor.
  const int64_t after_first = elements_from(1);
  int64_t k = 0 < after_first && after_first < kMinRowLength ? 0 : ndim - 1;
  while (k > 1 && elements_from(k) < block_size) k--;

  BlockLayout layout;
  layout.row_length = elements_from(k);
  layout.blocks_per_row = (layout.row_length + block_size - 1) / block_size;
  layout.leading_dims = k;
  for (int64_t d = 0; d < k; d++) layout.rows *= sizes[d];
  return layout;
}

}  // namespace torchao8
