// Argument checks. Each message names the op and the argument, what was expected and what came, and
// each is made before anything is written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "codec/floats.h"
#include "op/tensor_list.h"

namespace torchao8 {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Raises RuntimeError with the message alone. STD_TORCH_CHECK would put the C++ function, the
// source file and the line before it, which help nobody who gets it.
#define TORCHAO8_CHECK(condition, ...)                 \
  do {                                                 \
    if (!(condition)) ::torchao8::refuse(__VA_ARGS__); \
  } while (false)

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "dtype number " + std::to_string(int(type));
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t d = 0; d < sizes.size(); d++) out << (d ? ", " : "") << sizes[d];
  out << "]";
  return out.str();
}

template <class A, class B>
bool same_shape(const A& a, const B& b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); d++) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

// Which argument a check is about: its op, its name, and its index if it is an element of a list.
// The texts are put together when a check fails.
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;
  const char* suffix = "";  // of the name
  std::string text() const {
    std::ostringstream out;
    out << op << ": " << name << suffix;
    if (index >= 0) out << "[" << index << "]";
    return out.str();
  }
};

// Where all tensors of a call must be.
struct Device {
  bool cuda;
  int32_t index;
  bool portable = false;  // a device of any type, for a step in PyTorch's operators (check.cpp)
  int32_t type = 0;       // of it, in torch's numbers

  // Not every device has float64. Where it need not, such numbers come as float32.
  bool has_doubles() const { return !portable || cuda || type == aoti_torch_device_type_cpu(); }
};
constexpr Device kCpu = {false, 0};

inline void check_device(const Argument& a, const TensorView& t, const Device& device) {
  if (device.portable) {
    TORCHAO8_CHECK(t.get_device_type() == device.type && t.get_device_index() == device.index,
                   a.text(), " must be on the device of the other arguments; it is on another one");
  } else if (device.cuda) {
    TORCHAO8_CHECK(t.is_cuda() && t.get_device_index() == device.index, a.text(),
                   " must be on cuda:", device.index, ", where another argument is; it is on ",
                   t.is_cuda()  ? "cuda:" + std::to_string(t.get_device_index())
                   : t.is_cpu() ? std::string("the CPU")
                                : std::string("another device"));
  } else {
    TORCHAO8_CHECK(t.is_cpu(), a.text(),
                   " must be on the CPU, as the other arguments are; it is on another device");
  }
}

inline void check_dtype(const Argument& a, const TensorView& t, ScalarType expected) {
  TORCHAO8_CHECK(t.scalar_type() == expected, a.text(), " must be ", dtype_name(expected), ", got ",
                 dtype_name(t.scalar_type()));
}

template <class Sizes>
void check_shape(const Argument& a, const TensorView& t, const Sizes& expected, const char* why) {
  TORCHAO8_CHECK(same_shape(t.sizes(), expected), a.text(), " must have shape ",
                 shape_text(expected), " (", why, "), got ", shape_text(t.sizes()));
}

inline void check_contiguous(const Argument& a, const TensorView& t) {
  TORCHAO8_CHECK(t.is_contiguous(), a.text(), " must be contiguous, got strides ",
                 shape_text(t.strides()), " for shape ", shape_text(t.sizes()));
}

inline FloatType check_float_type(const Argument& a, const TensorView& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      TORCHAO8_CHECK(false, a.text(), " must be float32, bfloat16 or float16, got ",
                     dtype_name(t.scalar_type()));
  }
  return FloatType::kFloat32;
}

inline void check_block_size(const char* op, int64_t block_size) {
  TORCHAO8_CHECK(block_size >= 64 && block_size <= 2048 && (block_size & (block_size - 1)) == 0, op,
                 ": block_size must be a power of two from 64 to 2048, got ", block_size);
}

// Refuses a tensor that is written to and may hold an element twice.
inline void check_no_overlap(const Argument& a, const TensorView& t) {
  if (t.is_contiguous()) return;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); d++) {
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;  // of the dimensions so far
  for (const auto& [stride, size] : dims) {
    TORCHAO8_CHECK(stride >= extent, a.text(),
                   " is updated in place and must not overlap itself, as it may with strides ",
                   shape_text(strides), " for shape ", shape_text(sizes));
    extent = stride * (size - 1) + extent;
  }
}

// Tells whether a pointer has been there before: a hash table with open addressing, for up to so
// many pointers.
class PointerSet {
 public:
  explicit PointerSet(size_t most) {
    while (size_t(1) << log_size_ < 2 * most) log_size_++;
    slots_.assign(size_t(1) << log_size_, nullptr);
  }
  bool insert(const void* pointer) {
    if (pointer == nullptr) return !std::exchange(has_null_, true);
    const uint64_t hash = uint64_t(reinterpret_cast<uintptr_t>(pointer)) * 0x9e3779b97f4a7c15u;
    const size_t mask = slots_.size() - 1;
    for (size_t i = size_t(hash >> (64 - log_size_));; i = (i + 1) & mask) {
      if (slots_[i] == pointer) return false;
      if (slots_[i] != nullptr) continue;
      slots_[i] = pointer;
      return true;
    }
  }

 private:
  int log_size_ = 1;
  std::vector<const void*> slots_;  // null: free
  bool has_null_ = false;
};

[[noreturn]] inline void refuse_same_memory(const char* op, const char* name, const char* suffix,
                                            const TensorList& tensors) {
  std::vector<std::pair<const void*, size_t>> addresses;
  for (size_t i = 0; i < tensors.size(); i++) {
    if (tensors[i].numel() > 0) addresses.emplace_back(tensors[i].mutable_data_ptr(), i);
  }
  std::sort(addresses.begin(), addresses.end());
  size_t i = 1;
  while (addresses[i].first != addresses[i - 1].first) i++;
  refuse(op, ": ", name, suffix, "[", addresses[i - 1].second, "] and ", name, suffix, "[",
         addresses[i].second, "] must be different tensors, got the same memory twice");
}

// Of tensors that are written to: two threads may work on two entries of a list at once.
inline void check_distinct(const char* op, const char* name, const char* suffix,
                           const TensorList& tensors) {
  if (tensors.size() < 2) return;
  PointerSet seen(tensors.size());
  for (const TensorView& t : tensors) {
    if (t.numel() > 0 && !seen.insert(t.mutable_data_ptr()))
      refuse_same_memory(op, name, suffix, tensors);
  }
}

}  // namespace torchao8
