// Tensors as memory: dense ones by pointer, others through their strides, a piece at a time.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"
#include "op/checks.h"

namespace torchao8 {

constexpr int64_t size_of(FloatType type) {
  return type == FloatType::kFloat32 ? 4 : 2;
}

// A tensor of floats, addressed by the flat index of its elements in row-major order.
class FloatArray {
 public:
  FloatArray() = default;
  // The tensor must outlive it.
  FloatArray(const TensorView& t, FloatType type, const void* data)
      : type_(type), dense_(t.is_contiguous()), data_(static_cast<char*>(const_cast<void*>(data))) {
    if (dense_) return;
    sizes_ = t.sizes();
    strides_ = t.strides();
  }

  // Of elements without gaps, in whatever order.
  FloatArray(FloatType type, const void* data)
      : type_(type), data_(static_cast<char*>(const_cast<void*>(data))) {}

  FloatType type() const { return type_; }
  bool dense() const { return dense_; }
  char* at(int64_t i) const { return data_ + i * size_of(type_); }  // dense only

  void read(const ConvertKernels& convert, int64_t begin, int64_t n, float* to) const {
    if (dense_) return convert.widen(type_, at(begin), n, to);
    for_each_run(begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
      with_type([&](auto* x) {
        for (int64_t i = 0; i < count; i++) to[i] = scalar::load(x + offset + i * stride);
      });
      to += count;
    });
  }

  void write(const ConvertKernels& convert, const float* from, int64_t begin, int64_t n) const {
    if (dense_) return convert.narrow(type_, from, n, at(begin));
    for_each_run(begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
      with_type([&](auto* x) {
        for (int64_t i = 0; i < count; i++) scalar::store(x + offset + i * stride, from[i]);
      });
      from += count;
    });
  }

  // The same of bfloat16, rounded stochastically by a hash for each element.
  void write(const uint32_t* hashes, const float* from, int64_t begin, int64_t n) const {
    BFloat16* const x = reinterpret_cast<BFloat16*>(data_);
    const auto write_run = [&](int64_t offset, int64_t stride, int64_t count) {
      for (int64_t i = 0; i < count; i++) x[offset + i * stride] = to_bfloat16(from[i], hashes[i]);
      from += count;
      hashes += count;
    };
    if (dense_) return write_run(begin, 1, n);
    for_each_run(begin, n, write_run);
  }

 private:
  template <class Function>
  void with_type(Function f) const {
    if (type_ == FloatType::kFloat32) return f(reinterpret_cast<float*>(data_));
    if (type_ == FloatType::kBFloat16) return f(reinterpret_cast<BFloat16*>(data_));
    f(reinterpret_cast<Half*>(data_));
  }

  // Calls f(offset, stride, count) for the runs of the innermost dimension that make up [begin,
  // begin + n).
  template <class Function>
  void for_each_run(int64_t begin, int64_t n, Function f) const {
    const int64_t inner = sizes_.back(), stride = strides_.back();
    while (n > 0) {
      const int64_t column = begin % inner, count = std::min(n, inner - column);
      int64_t rest = begin / inner, offset = column * stride;
      for (size_t d = sizes_.size() - 1; d-- > 0; rest /= sizes_[d])
        offset += rest % sizes_[d] * strides_[d];
      f(offset, stride, count);
      begin += count;
      n -= count;
    }
  }

  FloatType type_ = FloatType::kFloat32;
  bool dense_ = true;
  char* data_ = nullptr;
  Sizes sizes_, strides_;
};

}  // namespace torchao8
