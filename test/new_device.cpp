// A device that the library has no kernels for, so that tests can step on one: PyTorch's slot for
// devices of other packages, PrivateUse1. Its memory is the host's, and each operator runs on a CPU
// tensor of the same memory. What real devices refuse it refuses too: float64 (as MPS does), CPU
// tensors of more than one element among its own, and copies that the host does not wait for. What
// a host has to wait for, it counts.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <deque>
#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using c10::DataPtr;
using c10::Storage;
using torch::jit::Stack;

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
std::atomic<int64_t> waits{0};

void refuse_float64(ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != ScalarType::Double, "this device has no float64");
}

// -- memory -------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  DataPtr allocate(size_t size) override {
    DataPtr memory = c10::GetCPUAllocator()->allocate(size);
    memory.unsafe_set_device(kDevice);
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};
Memory memory;

void set_layout(const Tensor& t, IntArrayRef sizes, IntArrayRef strides, int64_t offset) {
  t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
}

Tensor tensor_of(Storage storage, const Tensor& like, c10::DispatchKeySet keys) {
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  set_layout(t, like.sizes(), like.strides(), like.storage_offset());
  return t;
}

// As the views of PyTorch's own devices are made: of a tensor that was made outside of inference
// mode, such a view is made in it, too.
Tensor view_of(const Tensor& base, const Tensor& like) {
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, Storage(base.storage()), base.key_set(), like.dtype());
  set_layout(t, like.sizes(), like.strides(), like.storage_offset());
  return t;
}

// The memory of a tensor of the device as that of one of the CPU, which it does not own.
Tensor on_cpu(const Tensor& t) {
  const Storage& s = t.storage();
  void* data = s.mutable_data();
  DataPtr same(data, data, [](void*) {}, c10::Device(c10::DeviceType::CPU));
  Storage storage(Storage::use_byte_size_t(), s.nbytes(), std::move(same), c10::GetCPUAllocator(),
                  /*resizable=*/true);
  return tensor_of(std::move(storage), t, c10::DispatchKeySet(c10::DispatchKey::CPU));
}

// The memory of a CPU tensor as that of the device, which keeps the CPU tensor.
Storage own(const Tensor& cpu) {
  const Storage& s = cpu.storage();
  DataPtr data(
      s.mutable_data(), new Storage(s), [](void* owner) { delete static_cast<Storage*>(owner); },
      kDevice);
  return Storage(Storage::use_byte_size_t(), s.nbytes(), std::move(data), &memory,
                 /*resizable=*/true);
}

// -- any operator -------------------------------------------------------------------------------

// The tensors of the device among the arguments of a call, each with its twin on the CPU.
struct Twins {
  std::deque<std::pair<Tensor, Tensor>> pairs;
  bool has_others = false;

  Tensor to_cpu(const Tensor& t) {
    if (!t.defined() || t.device().type() != kDevice.type()) {
      has_others = has_others || (t.defined() && t.dim() > 0);
      return t;
    }
    pairs.emplace_back(t, on_cpu(t));
    return pairs.back().second;
  }

  // A result: an argument itself, a view of one, or a tensor of its own.
  Tensor to_device(const Tensor& result) {
    if (!result.defined()) return result;
    refuse_float64(result.scalar_type());
    for (const auto& [ours, twin] : pairs)
      if (result.is_same(twin)) return ours;
    for (const auto& [ours, twin] : pairs)
      if (result.storage().unsafeGetStorageImpl() == twin.storage().unsafeGetStorageImpl())
        return view_of(ours, result);
    return tensor_of(own(result), result, kKeys);
  }

  // An operator may have given an output another size, and other memory for it.
  void update() {
    for (const auto& [ours, twin] : pairs) {
      if (twin.storage().data() != ours.storage().data())
        ours.unsafeGetTensorImpl()->set_storage_keep_dtype(own(twin));
      if (twin.sizes() != ours.sizes() || twin.strides() != ours.strides())
        set_layout(ours, twin.sizes(), twin.strides(), twin.storage_offset());
    }
  }
};

template <class Convert>
void convert_tensors(c10::IValue& value, const Convert& convert) {
  if (value.isTensor()) {
    value = convert(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> converted;
    for (const Tensor& t : value.toTensorVector()) converted.push_back(convert(t));
    value = std::move(converted);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> converted;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      converted.push_back(t ? std::optional<Tensor>(convert(*t)) : std::nullopt);
    value = std::move(converted);
  } else if (value.isDevice()) {
    value = c10::Device(c10::DeviceType::CPU);
  }
}

// Operators whose results have a size that depends on values.
const std::set<std::string> kSizesOfValues = {"aten::nonzero", "aten::masked_select",
                                              "aten::_unique2", "aten::unique_dim",
                                              "aten::repeat_interleave"};

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  Twins twins;
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); i++)
    convert_tensors((*stack)[i], [&](const Tensor& t) { return twins.to_cpu(t); });
  TORCH_CHECK(!twins.has_others || twins.pairs.empty(), schema.name(),
              ": expected all tensors on one device");
  if (kSizesOfValues.count(schema.name())) waits++;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  twins.update();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    c10::IValue& value = (*stack)[i];
    if (!value.isTensor() && !value.isTensorList()) waits++;  // a number: of values on the device
    convert_tensors(value, [&](const Tensor& t) { return twins.to_device(t); });
  }
}

// -- the operators that deal with memory ----------------------------------------------------------

ScalarType dtype_of(std::optional<ScalarType> dtype) {
  const ScalarType known = dtype.value_or(c10::get_default_dtype_as_scalartype());
  refuse_float64(known);
  return known;
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return Tensor(at::detail::empty_generic(size, &memory, kKeys, dtype_of(dtype), format));
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return Tensor(at::detail::empty_strided_generic(size, stride, &memory, kKeys, dtype_of(dtype)));
}

bool is_here(const Tensor& t) {
  return t.device().type() == kDevice.type();
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  TORCH_CHECK(!non_blocking || is_here(from),
              "this device may read the host's memory later: expected non_blocking=False");
  if (is_here(from) && !is_here(to)) waits++;
  Tensor target = is_here(to) ? on_cpu(to) : to;
  target.copy_(is_here(from) ? on_cpu(from) : from);
  return to;
}

Tensor& set_storage(Tensor& t, Storage storage, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  set_layout(t, size, stride, offset);
  return t;
}

Tensor& set_whole_storage(Tensor& t, Storage storage) {
  const auto size = int64_t(storage.nbytes() / t.itemsize());
  return set_storage(t, std::move(storage), 0, {size}, {1});
}

Tensor& set_to(Tensor& t, const Tensor& other) {
  return set_storage(t, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

// -- the device as PyTorch asks for it ------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const Storage& storage, size_t size) const override {
    DataPtr data = memory.allocate(size);
    memory.copy_data(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};
Hooks hooks;
[[maybe_unused]] const bool registered = (c10::SetAllocator(kDevice.type(), &memory),
                                          at::RegisterPrivateUse1HooksInterface(&hooks), true);

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_to);
}

TORCH_LIBRARY(new_device, m) {
  m.def("waits() -> int", [] { return waits.load(); });
}
