// Tensors and gradients of the checks, with shapes, addresses and numbers that make wrong kernels
// differ.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/floats.cuh"
#include "cuda/table.cuh"
#include "format.h"

using namespace torchao8;

struct Shape {
  int64_t rows, columns;
  int shift;     // elements between the start of the memory and the tensor
  float spread;  // standard deviation of gradients
  int bad;       // gradient elements that are NaN, infinite or 3e38, in each step
  int64_t shard_offset = 0, row_stride = 0;
};

inline const Shape kShapes[] = {
    {4, 256, 0, 1, 0},
    {6, 1024, 0, 1e-3f, 0},
    {3, 16, 0, 1, 0},
    {5, 255, 0, 1, 0},
    {5, 257, 0, 1, 0},
    {2, 300, 0, 1, 0},
    {7, 576, 0, 1e-2f, 0},
    {3, 24, 0, 1, 0},
    {4, 512, 1, 1, 0},
    {4, 512, 8, 1, 0},
    {4, 768, 0, 1, 3},
    {3, 333, 0, 1, 5},
    {2, 512, 0, 0, 0},
    {2, 512, 0, 1e-18f, 0},
    {2, 512, 0, 1e-30f, 0},
    {2, 512, 0, 1e17f, 0},
    {1, 5000, 0, 1, 0},
    {1, 5003, 0, 1, 0},
    {12, 2048, 0, 1e-4f, 0},
    {0, 256, 0, 1, 0},
    {3, 512, 0, 1, 0, 1536, 2048},
    {3, 700, 0, 1, 0, 1001, 2803},
    {9, 251, 0, 1, 1, 77, 1003},
    // About 2^126 when squared: some are not usable, and some states that are kept are rounded up
    // to that.
    {8, 512, 0, 8e18f, 0},
};

// A tensor with so many blocks that a warp prepares random numbers more than once: for 32 blocks at
// a time, where 24 warps share the blocks of all tensors. kTinyOnes are more tensors than a thread
// block prepares rules for at a time.
constexpr Shape many(int block_size) {
  return {150, block_size * 4, 0, 1, 0};
}
constexpr Shape kTiny = {1, 24, 0, 1, 0};
constexpr int kTinyOnes = 80;

struct TensorOf {
  Shape shape;
  FloatType param_type, grad_type;
  std::vector<unsigned char> param, grad;
  std::vector<uint8_t> codes[kMaxStates];
  std::vector<float> scales[kMaxStates], states[kMaxStates];
  float step = 0;
  bool has_factors = false;
  double factors[kFactors] = {};
  float scalars[kMaxScalars] = {};

  int64_t count() const { return shape.rows * shape.columns; }
  int64_t blocks_per_row(int block_size) const {
    return (shape.columns + block_size - 1) / block_size;
  }
  unsigned char* place(std::vector<unsigned char>& of, FloatType type) {
    const size_t misfit = reinterpret_cast<uintptr_t>(of.data()) % 16;
    return of.data() + (16 - misfit) % 16 + size_t(shape.shift) * cuda::bytes_of(type);
  }
  static constexpr int64_t code_bytes(int64_t elements) {  // of a row, or of its beginning
    return (elements * Format::kBits + 7) / 8;
  }
  uint8_t* code_place(int s, int64_t row = 0, int64_t column = 0) {
    const size_t misfit = reinterpret_cast<uintptr_t>(codes[s].data()) % 16;
    return codes[s].data() + (16 - misfit) % 16 + shape.shift + row * code_bytes(shape.columns) +
           code_bytes(column);
  }
};

template <class Rule>
TensorOf make_tensor(const Shape& shape, FloatType param_type, FloatType grad_type, int block_size,
                     std::mt19937& random) {
  TensorOf t;
  t.shape = shape;
  t.param_type = param_type;
  t.grad_type = grad_type;
  const size_t n = size_t(t.count()) + size_t(shape.shift);
  t.param.resize(n * cuda::bytes_of(param_type) + 16);
  t.grad.resize(n * cuda::bytes_of(grad_type) + 16);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < t.count(); i++)
    cuda::store_as(param_type, t.place(t.param, param_type), i, normal(random));
  cuda::for_each_state<Rule::kStates>([&](auto s) {
    t.codes[s].assign(size_t(shape.rows * t.code_bytes(shape.columns)) + size_t(shape.shift) + 16,
                      Format::template zero_byte<Rule::kSigned[s]>());
    t.scales[s].assign(size_t(shape.rows * t.blocks_per_row(block_size)), 0.0f);
    t.states[s].assign(size_t(t.count()), 0.0f);
  });
  for (float& scalar : t.scalars) scalar = 1;
  return t;
}

// What every entry of a kernel's table has of it.
template <class Rule, class Entry>
void set_addresses(Entry& entry, TensorOf& t) {
  entry.param = t.place(t.param, t.param_type);
  entry.grad = t.place(t.grad, t.grad_type);
  entry.step = &t.step;
  entry.factors = t.has_factors ? t.factors : nullptr;
  entry.param_type = t.param_type;
  entry.grad_type = t.grad_type;
  if constexpr (kScalarsOf<Rule> > 0) {
    for (int s = 0; s < kScalarsOf<Rule>; s++) entry.scalars[s] = &t.scalars[s];
  }
}

// Its rule at its next step; `scalars` gets the new scalar states.
template <class Rule>
Rule next_rule(const TensorOf& t, const typename Rule::Options& options, bool scaled_state,
               float* scalars) {
  typename Rule::Options own = options;
  if (t.has_factors) own.multiply(t.factors);
  std::copy(t.scalars, t.scalars + kMaxScalars, scalars);
  return rule_at_step<Rule>(own, int64_t(t.step) + 1, scaled_state, scalars);
}

inline void new_gradient(TensorOf& t, int step, std::mt19937& random) {
  std::normal_distribution<float> normal;
  unsigned char* grad = t.place(t.grad, t.grad_type);
  for (int64_t i = 0; i < t.count(); i++)
    cuda::store_as(t.grad_type, grad, i, normal(random) * t.shape.spread);
  const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};
  for (int k = 0; k < t.shape.bad; k++)
    cuda::store_as(t.grad_type, grad, int64_t(random() % uint64_t(t.count())), bad[(k + step) % 4]);
}
