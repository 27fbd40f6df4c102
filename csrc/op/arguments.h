// The arguments of an op, gone through in the order of its schema. One function per op names each
// argument once and says which member of its call it is; a SchemaWriter (op/schema.h) makes the
// schema's text of that, a StackReader reads the arguments that torch passes. So no two can be
// swapped.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "op/interpreter.h"
#include "op/tensor_list.h"

namespace torchao8 {

enum class Access { kRead, kWrite };

// Holds the arguments of a call and lets go of them under Python's lock, also when a check throws:
// else torch takes and releases the lock for each tensor whose last other owner is a Python object.
// That costs as much as all of the checks, and far more while another thread runs Python.
template <class T>
class Held {
 public:
  template <class... Parts>
  explicit Held(std::in_place_t, Parts&&... parts)
      : value_(std::make_unique<T>(std::forward<Parts>(parts)...)) {}
  Held(const Held&) = delete;
  ~Held() {
    const InterpreterLock lock;
    value_.reset();
  }
  T& operator*() { return *value_; }

 private:
  std::unique_ptr<T> value_;
};

// Reads a call's arguments from torch's stack, and owns them from then on.
class StackReader {
 public:
  StackReader(StableIValue* stack, uint64_t count) : stack_(stack), count_(count) {}

  void list(const std::string&, TensorList& to, Access = Access::kRead) {
    to = TensorList(read<StableListHandle>());
  }
  void tensor(const char*, std::optional<Tensor>& to) { to = read<Tensor>(); }
  void optional_tensor(const char*, std::optional<Tensor>& to) {
    to = read<std::optional<Tensor>>();
  }
  void keywords() {}
  void flag(const char*, bool& to) { to = read<bool>(); }
  void option(const char*, bool& to) { to = read<bool>(); }
  void option(const char*, int64_t& to) { to = read<int64_t>(); }
  void symbolic_option(const char*, int64_t& to) { to = read<int64_t>(); }
  void option(const char*, std::vector<int64_t>& to) { to = read<std::vector<int64_t>>(); }

  // Whether all of them have been read.
  bool done() const { return next_ == count_; }

 private:
  template <class T>
  T read() {
    STD_TORCH_CHECK(next_ < count_, "the schema has fewer arguments than the kernel");
    return torch::stable::detail::to<T>(stack_[next_++]);
  }

  StableIValue* stack_;
  uint64_t count_, next_ = 0;
};

}  // namespace torchao8
