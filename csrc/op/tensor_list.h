// The tensors of an op's arguments, taken apart once for each call.
//
// torch::stable::Tensor asks torch for a property at each use, by a call through the C interface,
// and allocates a reference count. A step of 1,000 small tensors spent half of its time there. A
// view keeps what was asked. It lives as long as one call of an op: nothing here, an address least
// of all, is kept from one call to the next.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace torchao8 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// torch's own numbers of dtypes, which are not those of ScalarType, looked up.
inline ScalarType scalar_type_of(int32_t dtype) {
  struct Table {
    std::array<ScalarType, 64> types;
    Table() {
      types.fill(ScalarType::Undefined);
      const auto set = [&](int32_t number, ScalarType type) {
        if (size_t(number) < types.size()) types[size_t(number)] = type;
      };
      set(aoti_torch_dtype_float32(), ScalarType::Float);
      set(aoti_torch_dtype_float64(), ScalarType::Double);
      set(aoti_torch_dtype_bfloat16(), ScalarType::BFloat16);
      set(aoti_torch_dtype_float16(), ScalarType::Half);
      set(aoti_torch_dtype_uint8(), ScalarType::Byte);
      set(aoti_torch_dtype_int64(), ScalarType::Long);
    }
  };
  static const Table table;
  if (size_t(dtype) < table.types.size() && table.types[size_t(dtype)] != ScalarType::Undefined)
    return table.types[size_t(dtype)];
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype));
}

// What the checks and the engines ask of a tensor. It owns nothing.
class TensorView {
 public:
  TensorView(const Tensor& t) : TensorView(t.get()) { inspect(); }
  // Nothing may be asked of it before inspect().
  explicit TensorView(AtenTensorHandle handle) : handle_(handle) {}

  void inspect() {
    static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
    int32_t dtype = 0;
    int64_t dim = 0;
    int64_t* sizes = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &device_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    is_cpu_ = device_ == cpu;
    is_cuda_ = device_ == cuda;
    dtype_ = dtype;
    type_ = scalar_type_of(dtype);
    sizes_ = Sizes(sizes, size_t(dim));
    numel_ = 1;
    for (int64_t d = 0; d < dim; d++) numel_ *= sizes[d];
    if (dim > 0) TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is_contiguous_));
  }

  ScalarType scalar_type() const { return type_; }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t numel() const { return numel_; }
  Sizes sizes() const { return sizes_; }
  bool is_contiguous() const { return is_contiguous_; }
  bool is_cpu() const { return is_cpu_; }
  bool is_cuda() const { return is_cuda_; }
  size_t element_size() const { return aoti_torch_dtype_element_size(dtype_); }
  int32_t get_device_type() const { return device_; }
  int32_t get_device_index() const {
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    return index;
  }
  Sizes strides() const {
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return Sizes(strides, sizes_.size());
  }

  const void* const_data_ptr() const {
    if (!has_data_) {
      const void* data = nullptr;
      TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
      data_ = const_cast<void*>(data);
      has_data_ = true;
    }
    return data_;
  }
  // For writing: a tensor that shares its memory with others until it is written to (a lazy clone)
  // gets memory of its own.
  void* mutable_data_ptr() const {
    if (!is_writable_) {
      TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data_));
      has_data_ = is_writable_ = true;
    }
    return data_;
  }
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(const_data_ptr());
  }
  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }

  AtenTensorHandle handle() const { return handle_; }
  // The same tensor, for torch's functions.
  Tensor tensor() const {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return Tensor(handle);
  }

 private:
  AtenTensorHandle handle_;
  Sizes sizes_;
  int64_t numel_ = 0;
  mutable void* data_ = nullptr;
  int32_t dtype_ = 0, device_ = 0;
  ScalarType type_ = ScalarType::Undefined;
  bool is_cpu_ = false, is_cuda_ = false, is_contiguous_ = true;
  mutable bool has_data_ = false, is_writable_ = false;
};

// An argument that is a list of tensors. It owns the handles that torch made for it.
class TensorList {
 public:
  TensorList() = default;
  // Takes over torch's list. inspect() follows, when all arguments of the call have an owner.
  explicit TensorList(StableListHandle list) : TensorList() {
    struct Deleted {
      StableListHandle list;
      ~Deleted() { torch_delete_list(list); }
    } deleted = {list};
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    views_.reserve(size);
    for (size_t i = 0; i < size; i++) {
      StableIValue element = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      views_.emplace_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
  }
  TensorList(TensorList&& other) noexcept { views_.swap(other.views_); }
  TensorList& operator=(TensorList&& other) noexcept {
    views_.swap(other.views_);
    return *this;
  }
  ~TensorList() {
    for (const TensorView& view : views_) aoti_torch_delete_tensor_object(view.handle());
  }

  void inspect() {
    for (TensorView& view : views_) view.inspect();
  }

  size_t size() const { return views_.size(); }
  bool empty() const { return views_.empty(); }
  const TensorView& operator[](size_t i) const { return views_[i]; }
  auto begin() const { return views_.begin(); }
  auto end() const { return views_.end(); }

 private:
  std::vector<TensorView> views_;
};

}  // namespace torchao8
